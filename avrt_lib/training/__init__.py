"""Training of the student: the cold start on merged traces (SFT) and group-relative policy optimisation (GRPO)."""

from avrt_lib import compat

# Before any module of this package imports transformers, which imports torchvision.
compat.apply()
compat.set_defaults({"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"})
