"""The deployment component."""

from components.deployment.component import deployment

__all__ = ["deployment"]
