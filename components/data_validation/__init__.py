"""The data_validation component."""

from components.data_validation.component import data_validation

__all__ = ["data_validation"]
