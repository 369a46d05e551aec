"""The two single-modality teachers: each answers every training question from what it alone perceives.

``vision`` and ``audio`` are the two steps; what they share is in ``common``. Neither teacher is told the answer (paper,
method 2), and nothing is dropped: a sample without a teacher's modality gets a row that says so.
"""
