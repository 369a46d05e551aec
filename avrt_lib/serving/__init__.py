"""Serving: the one launcher of vLLM, a served model on this machine, the client, and the deployment step."""
