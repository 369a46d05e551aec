"""The audio_teacher component."""

from components.audio_teacher.component import audio_teacher

__all__ = ["audio_teacher"]
