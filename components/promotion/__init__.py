"""The promotion component."""

from components.promotion.component import promotion

__all__ = ["promotion"]
