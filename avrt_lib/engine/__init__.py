"""Engines: OpenAI chat messages in, completions out, from vLLM in this process or from an endpoint."""
