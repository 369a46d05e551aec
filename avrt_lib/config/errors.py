"""What pydantic finds wrong in a document, said in one line that names each key and the one that may be meant."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def validation_message(error: ValidationError, model: type[BaseModel]) -> str:
    """What pydantic found wrong in a document of this model, as one line that names each key."""
    problems = [
        f"{'.'.join(map(str, e['loc'])) or '(whole file)'}: {_problem(e, model)}"
        for e in error.errors(include_url=False)
    ]
    return "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


def _problem(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    if error["type"] != "extra_forbidden":
        return str(error["msg"]).removeprefix("Value error, ")
    *parents, key = error["loc"]
    known = _keys_of(model, parents)
    alike = difflib.get_close_matches(str(key), known, n=1)
    if alike:
        return f"there is no such key; {alike[0]} may be meant"
    return "there is no such key" + (f" among {', '.join(sorted(known))}" if known else "")


def _keys_of(model: type[BaseModel], parents: Sequence[int | str]) -> list[str]:
    """The keys of the section to which the parents lead; none where that is not told by the types alone."""
    for parent in parents:
        field = model.model_fields.get(str(parent))
        annotation = field.annotation if field is not None else None
        sections = [
            kind
            for kind in (annotation, *get_args(annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if not sections:
            return []
        model = sections[0]
    return list(model.model_fields)
