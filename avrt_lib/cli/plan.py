"""``avrt plan``: what a run will take, before it asks for anything."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from avrt_lib import planning
from avrt_lib.cli.console import out
from avrt_lib.cli.models import Debug
from avrt_lib.cli.options import find_config, resolve
from avrt_lib.cluster.profile import find_profile, load_profile
from avrt_lib.config import parse_set
from avrt_lib.errors import UsageError


def plan(
    config: Annotated[Path, typer.Option("--config", "-c", help="The configuration of the run.", metavar="FILE")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Set one value of the configuration.", metavar="SECTION.KEY=VALUE"),
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="The cluster's profile: its GPUs, their memory and price.", metavar="FILE")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Training questions [as configured].")] = None,
    training_gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of a training step [the profile's].")] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GiB of one GPU [that of the step's pool, or 80].")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of one GPU-hour [the profile's].")] = None,
    assume: Annotated[
        list[str] | None, typer.Option(help="Put a figure of your own in the place of an assumption.", metavar="KEY=N")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Estimate a run: hours, GPU-hours, pods, memory of a GPU, disk and cost, with every assumption.

    Example: `avrt plan --config configs/avrt-3b.yaml --cluster configs/clusters/onprem-h100.yaml --price 2.5`
    """
    from avrt_lib.cli.run import compile_file

    place = find_profile(cluster) if cluster else None
    profile = load_profile(place) if place else None
    changes = {**(profile.overrides if profile else {}), **parse_set(settings or [])}
    loaded = resolve(find_config(config), changes)
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "pipeline.yaml"
        compile_file(loaded, compiled, {}, pipeline="avrt", cluster=place, kubernetes=False)
        spec = next(yaml.safe_load_all(compiled.read_text(encoding="utf-8")))
    made = planning.make(
        loaded,
        spec,
        profile=profile,
        samples=samples,
        training_gpus=training_gpus,
        gpu_memory_gib=gpu_memory,
        price=price,
        assume=_figures(assume or []),
    ).to_json()
    if as_json:
        print(json.dumps(made, indent=2, ensure_ascii=False))
    else:
        show(made)


def _figures(items: list[str]) -> dict[str, float]:
    """``["pod_s=4", …]`` as numbers.

    Raises:
        UsageError: where an item is no KEY=NUMBER.
    """
    found = {}
    for item in items:
        key, _, value = item.partition("=")
        try:
            found[key.strip()] = float(value)
        except ValueError as error:
            raise UsageError(f"--assume takes KEY=NUMBER, not {item!r}.") from error
    return found


def show(made: dict[str, Any]) -> None:
    """Print a plan's document as tables."""
    steps = Table("step", "tasks", "hours each", "GPUs each", "GPU-hours", "", title=f"Plan of {made['name']}")
    for name, step in made["steps"].items():
        numbers = (step["tasks"], step["hours_each"], step["gpus_each"], step["gpu_hours"])
        steps.add_row(name, *map(str, numbers), escape(step["note"]))
    out.print(steps)
    if made["memory"]:
        memory = Table("step", "GiB of a GPU", "GiB of its host", "of it", "", title="Memory")
        for item in made["memory"]:
            parts = ", ".join(f"{name} {value:g}" for name, value in item["parts"].items())
            needed = f"{item['gpu_gib']:g} of {item['of_gib']:g}"
            memory.add_row(item["step"], needed, f"{item['host_gib']:g}", parts, item["note"])
        out.print(memory)
    disk = ", ".join(f"{name} {value:g}" for name, value in made["disk_gb"].items())
    out.print(f"Disk: {sum(made['disk_gb'].values()):.3g} GB ({disk})", soft_wrap=True)
    cost = "" if made["cost"] is None else f", cost {made['cost']:g} at {made['price_per_gpu_hour']:g} a GPU-hour"
    out.print(
        f"Whole run: {made['hours']:g} hours with {made['gpus_at_once']} GPUs, {made['gpu_hours']:g} GPU-hours{cost}; "
        f"{made['pods']} pods on a cluster, whose starts take {made['pod_overhead_s'] / 60:.0f} minutes of it",
        soft_wrap=True,
    )
    for warning in made["warnings"]:
        out.print(f"Note: {warning}", soft_wrap=True)
    out.print("Assumptions, none of which is a promise (--assume KEY=N replaces one):", soft_wrap=True)
    for name, assumption in made["assumptions"].items():
        out.print(f"  {name} = {assumption['value']:g}: {escape(assumption['what'])}", soft_wrap=True)
