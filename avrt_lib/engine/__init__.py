"""Engines that answer chat requests with media, and the runner that commits what they answered chunk by chunk."""
