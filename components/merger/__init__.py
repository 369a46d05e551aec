"""The merger component."""

from components.merger.component import merger

__all__ = ["merger"]
