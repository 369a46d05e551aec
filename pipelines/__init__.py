"""Graphs of components. ``pipelines.avrt`` is the whole path from clips to a served model."""
