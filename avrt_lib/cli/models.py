"""``avrt models``: bring models here, without a hub in reach afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from avrt_lib.cli.console import err, out
from avrt_lib.cli.options import find_config
from avrt_lib.config import HUB, MODELS_LOCK, load
from avrt_lib.errors import UsageError
from avrt_lib.hub.folder import Published
from avrt_lib.licences import loaded_models

app = typer.Typer(
    name="models",
    help="Bring models here: pull, import, prepare; and their licences.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

To = Annotated[str, typer.Option("--to", help="A folder, or s3://BUCKET of the store.", metavar="PLACE")]
Lock = Annotated[
    Path | None, typer.Option(help="The lock file [configs/models.lock; with --config, beside it].", metavar="FILE")
]
Named = Annotated[str | None, typer.Option("--name", help="The model's id, ORG/NAME.", metavar="ID")]
Revision = Annotated[str | None, typer.Option(help="The commit that the folder is of.", metavar="COMMIT")]


def _debug(value: bool) -> bool:
    if value:
        os.environ["AVRT_DEBUG"] = "1"
    return value


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_debug, is_eager=True)]
DEFAULT_LOCK = Path("configs") / MODELS_LOCK


@app.command()
def pull(
    to: To,
    model: Annotated[
        str | None, typer.Argument(help="ORG/NAME, or ORG/NAME/ADAPTER; @REVISION behind it.", metavar="MODEL")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Pull every hub model of it.", metavar="FILE")
    ] = None,
    lock: Lock = None,
    debug: Debug = False,
) -> None:
    """Fetch a model (or all of a configuration) from the hub, check it, publish it, and write down its commit.

    Examples: `avrt models pull Qwen/Qwen2.5-Omni-3B@main --to /models`;
    `avrt models pull --config configs/avrt-3b.yaml --to s3://avrt`
    """
    from avrt_lib.hub.pull import Reference
    from avrt_lib.hub.pull import pull as fetch

    if (model is None) == (config is None):
        raise UsageError("Name either a model or a configuration with --config.")
    if model is not None:
        name, _, revision = model.partition("@")
        wanted = {Reference.parse(name): revision or "main"}
        lock = lock or DEFAULT_LOCK
    else:
        file = find_config(config)  # type: ignore[arg-type]
        wanted = {Reference.parse(name): revision or "main" for name, revision in _hub_models(file)}
        lock = lock or file.parent / MODELS_LOCK
        if not wanted:
            raise UsageError(f"{file} names no hub model (hub:ORG/NAME).")
    for reference, revision in wanted.items():
        err.print(f"Pulling {reference.name} at {revision} …", soft_wrap=True)
        _note(fetch(reference, revision, to), lock)


@app.command(name="import")
def import_(
    folder: Annotated[Path, typer.Argument(help="A model folder that came by disk.")],
    to: To,
    name: Named = None,
    revision: Revision = None,
    lock: Lock = None,
    debug: Debug = False,
) -> None:
    """Check a model folder (manifest, SHA256SUMS, no pickles) and publish it.

    Example: `avrt models import /media/disk/Qwen2.5-Omni-3B --name Qwen/Qwen2.5-Omni-3B --revision COMMIT --to s3://avrt`
    """
    from avrt_lib.hub.importing import import_folder

    _note(import_folder(folder, to, name=name, revision=revision), lock or DEFAULT_LOCK)


@app.command()
def prepare(
    folder: Annotated[Path, typer.Argument(help="A model folder that came by disk.")],
    to: To,
    adapter: Annotated[
        str | None, typer.Option(help="Merge the adapter in this folder of the model.", metavar="FOLDER")
    ] = None,
    name: Named = None,
    revision: Revision = None,
    lock: Lock = None,
    debug: Debug = False,
) -> None:
    """Turn a model into one that can be used: merge its adapter, convert pickles, check code that it brings.

    Example: `avrt models prepare /media/disk/audio-flamingo-3-hf --adapter think --name nvidia/audio-flamingo-3-hf
    --revision COMMIT --to /models`
    """
    from avrt_lib.hub.prepare import prepare as make

    _note(make(folder, to, name=name, revision=revision, adapter=adapter), lock or DEFAULT_LOCK)


@app.command()
def licences(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Only what this configuration uses.", metavar="FILE")
    ] = None,
    debug: Debug = False,
) -> None:
    """Show the licences of the models that this project knows; their cards have the last word.

    Example: `avrt models licences --config configs/avrt-3b.yaml`
    """
    from avrt_lib.cli.options import resolve
    from avrt_lib.licences import KNOWN, licences_of

    rows = list(KNOWN.values())
    if config is not None:
        used = licences_of(resolve(find_config(config), {}))
        rows = [licence for licence in used.values() if licence is not None]
        for reference in [reference for reference, licence in used.items() if licence is None]:
            err.print(f"{reference}: its licence is not known here; read its card.", soft_wrap=True, markup=False)
    table = Table("model", "licence", "commercial use", "note")
    for row in rows:
        table.add_row(row.model, row.licence, row.commercial, row.note)
    out.print(table)
    out.print("Each model's card has the last word: https://huggingface.co/MODEL")


def _hub_models(file: Path) -> Iterator[tuple[str, str | None]]:
    """The hub models of a configuration as the file itself names them, whatever a lock says."""
    for part in loaded_models(load(file, pinned=False)).values():
        if part.model.startswith(HUB):
            yield part.model, part.revision


def _note(published: Published, lock: Path) -> None:
    out.print(f"{published.name}: {published.address}", soft_wrap=True, markup=False)
    if published.revision is None:
        err.print("No commit is known, so nothing is written to the lock: name it with --revision.", soft_wrap=True)
        return
    from avrt_lib.hub.lock import record

    record(lock, published.name, published.revision, published.address)
    err.print(f"Written to {lock}", soft_wrap=True, markup=False)
