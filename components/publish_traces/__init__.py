"""The publish_traces component."""

from components.publish_traces.component import publish_traces

__all__ = ["publish_traces"]
