"""The ``avrt`` command."""
