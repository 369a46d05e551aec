"""The miniature: a procedural world of clips and questions, and four tiny models that know it.

Nothing in the pipeline knows of it: ingest reads its clips as it reads AVQA, and its models are ordinary model folders
of the production models' families.
"""
