"""Training of the student: the cold start on merged traces (SFT) and group-relative policy optimisation (GRPO)."""
