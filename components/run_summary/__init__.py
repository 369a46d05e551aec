"""The run_summary component."""

from components.run_summary.component import run_summary

__all__ = ["run_summary"]
