#!/usr/bin/env python3
"""Bring the generated part of docs/fidelity.md up to date: ``make docs``."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIDELITY = ROOT / "docs" / "fidelity.md"
_PART = re.compile(r"(<!-- begin: make docs -->\n).*?(\n<!-- end -->)", re.DOTALL)


def fidelity() -> str:
    """The table of the paper's values, as ``avrt fidelity --markdown`` prints it for the miniature."""
    from avrt_lib.cli.results import fidelity_markdown
    from avrt_lib.config import load

    return fidelity_markdown(load(ROOT / "configs" / "miniature.yaml"))


def with_table(page: str, table: str) -> str:
    """The page with this table between its marks.

    Raises:
        ValueError: where the page does not have the marks exactly once.
    """
    new, count = _PART.subn(lambda match: match[1] + table + match[2], page)
    if count != 1:
        raise ValueError(f"{FIDELITY} must hold the two marks once; it holds them {count} times.")
    return new


def main() -> int:
    """Rewrite the page."""
    FIDELITY.write_text(with_table(FIDELITY.read_text(encoding="utf-8"), fidelity()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
