"""One optimizer step of the cold start at several batch sizes: samples a second and peak memory, in one run.

python benchmarks/sft_step.py --steps 10
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "miniature.yaml"


def changed(batch: int, steps: int) -> dict[str, object]:
    """What of the miniature's configuration is changed: no validation but one, and no stop."""
    return {
        "sft.per_device_batch": batch,
        "sft.max_steps": steps,
        "sft.stop_low": None,
        "sft.cooldown_from": None,
        "sft.validation_samples": 1,
    }


def measure(batch: int, steps: int, data: Path) -> None:
    """Train for some steps without validating; prints the figures."""
    from avrt_lib.config import load
    from avrt_lib.steps import run_step

    facts = run_step(
        "sft",
        config=load(CONFIG, changed(batch, steps)),
        inputs={"samples": data / "samples", "merged": data / "merged"},
        outputs={"model": data / f"model-{batch}"},
    )
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    speed = batch * steps / facts["seconds"]
    for what, unit, value in (("speed", "samples/s", speed), ("peak_memory", "GiB", peak_gib)):
        print(json.dumps({"name": f"sft.batch_{batch}.{what}", "unit": unit, "value": round(value, 2)}), flush=True)


def main() -> None:
    """Command line; each measurement has a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--measure", nargs=2, metavar=("BATCH", "DATA"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(int(options.measure[0]), options.steps, Path(options.measure[1]))
        return

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests import tiny_models

    with tempfile.TemporaryDirectory(prefix="avrt-bench-") as folder:
        tiny_models.write_data(Path(folder), train=128)
        for batch in (8, 32, 64):
            command = [sys.executable, __file__, "--steps", str(options.steps), "--measure", str(batch), folder]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(done.stderr)


if __name__ == "__main__":
    main()
