"""API keys and tokens, as a request's header takes them."""

from __future__ import annotations

from avrt_lib.errors import ConfigError


def header_key(text: str, name: str) -> str:
    """A key without the white space around it: the line break of the file that it was kept in is no part of it.

    Args:
        text: the key as it was given.
        name: where it was given, for the error.

    Raises:
        ConfigError: where it holds what no header may hold. HTTP clients show such a key in their error; this does not.
    """
    key = text.strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{name} holds a line break or a character outside ASCII: give the key alone.")
    return key
