"""AVRT: audio-visual reasoning transfer through single-modality teachers, as a pipeline.

Every step of the pipeline is a subpackage with one public ``run(...)``; nothing here imports kfp.
"""

__version__ = "0.1.0"
