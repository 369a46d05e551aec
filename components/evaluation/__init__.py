"""The evaluation component."""

from components.evaluation.component import evaluation

__all__ = ["evaluation"]
