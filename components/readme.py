"""Write each component's README from its docstring: ``python -m components.readme [--check]``."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


def names() -> list[str]:
    """The components, which are the folders with a ``component.py``."""
    return sorted(path.parent.name for path in HERE.glob("*/component.py"))


def component(name: str) -> Any:
    """The KFP component of this name."""
    return getattr(importlib.import_module(f"components.{name}.component"), name)


def render(name: str) -> str:
    """The README of a component, as Markdown."""
    loaded = component(name)
    spec = loaded.component_spec
    metadata = yaml.safe_load((HERE / name / "metadata.yaml").read_text(encoding="utf-8"))
    described = _described(loaded.python_func.__doc__ or "")
    summary = (loaded.python_func.__doc__ or "").split("Args:")[0]
    lines = [f"# {name}", "", *_dedented(summary), ""]
    lines += [f"Image: `{metadata['image']}`. Stability: {metadata['stability']}.", ""]
    lines += ["## Inputs", "", "| name | type | default | what |", "|---|---|---|---|"]
    for key, value in (spec.inputs or {}).items():
        default = (
            f"`{value.default!r}`"
            if value.optional and not _artifact(value.type)
            else "absent"
            if value.optional
            else ""
        )
        lines.append(f"| `{key}` | {_type(value)} | {default} | {described.get(key, '')} |")
    lines += ["", "## Outputs", "", "| name | type | what |", "|---|---|---|"]
    for key, value in (spec.outputs or {}).items():
        lines.append(f"| `{key}` | {_type(value)} | {described.get(key, '')} |")
    return "\n".join(lines).rstrip() + "\n"


def _artifact(kind: str) -> bool:
    return kind.startswith("system.")


def _type(value: Any) -> str:
    title = value.type.removeprefix("system.").split("@")[0]
    return f"list of {title}" if getattr(value, "is_artifact_list", False) else title


def _dedented(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def _described(docstring: str) -> dict[str, str]:
    """The descriptions under ``Args`` and ``Returns`` of a Google-style docstring, by name."""
    found: dict[str, str] = {}
    current = ""
    for line in docstring.split("Args:")[-1].splitlines():
        text = line.strip()
        head, colon, rest = text.partition(": ")
        if line.startswith(" " * 8) and not line.startswith(" " * 12) and colon and head.isidentifier():
            current = head
            found[current] = rest
        elif text and line.startswith(" " * 12) and current:
            found[current] += f" {text}"
    return found


def main(arguments: list[str] | None = None) -> int:
    """Write the READMEs, or with ``--check`` say which are not up to date."""
    parser = argparse.ArgumentParser(prog="python -m components.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where one is not up to date")
    check = parser.parse_args(arguments).check
    stale = []
    for name in names():
        path = HERE / name / "README.md"
        text = render(name)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if stale:
        print(f"{'Not up to date' if check else 'Written'}: {', '.join(stale)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
