"""The vision_teacher component."""

from components.vision_teacher.component import vision_teacher

__all__ = ["vision_teacher"]
