"""The import_traces component."""

from components.import_traces.component import import_traces

__all__ = ["import_traces"]
