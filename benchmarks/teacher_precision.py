"""The teachers' engines in float32 and bfloat16 on the same clips: rows a second and peak memory, in one run.

python benchmarks/teacher_precision.py --rows 100

On a GPU bfloat16 wins; a CPU without instructions for it computes it through float32 and more slowly.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "miniature.yaml"
PRECISIONS = ("float32", "bfloat16")


def measure(role: str, precision: str, samples: Path, rows: int) -> None:
    """Answer all of the samples after a tenth of them as a warm-up; prints the figures."""
    from avrt_lib.config import load
    from avrt_lib.engine import factory
    from avrt_lib.engine.base import ChatRequest
    from avrt_lib.engine.messages import teacher_messages
    from avrt_lib.records import Sample
    from avrt_lib.tables import read_rows

    config = load(CONFIG, {f"teachers.{role}.engine.dtype": precision})
    teacher = getattr(config.teachers, role)
    engine_config = teacher.engine
    requests = []
    for number, sample in enumerate(read_rows(samples, Sample, split="train")):
        messages = teacher_messages(role, teacher.prompt, sample)
        if messages is not None:
            requests.append(ChatRequest(sample.id, messages, engine_config.max_tokens, 1.0, 1.0, number))
    limits = {"image": config.data.frames, "video": 0} if role == "vision" else {"audio": 1}
    with factory.build(engine_config, limits=limits) as engine:
        engine.chat(requests[: max(1, rows // 10)])
        started = time.monotonic()
        completions = engine.chat(requests)
        seconds = time.monotonic() - started
    failed = [c.error for c in completions if c.error]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(requests)} requests failed: {failed[0]}")
    name = f"{role}_teacher.{precision}"
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for what, unit, value in (("speed", "rows/s", len(requests) / seconds), ("peak_memory", "GiB", peak_gib)):
        print(json.dumps({"name": f"{name}.{what}", "unit": unit, "value": round(value, 2)}), flush=True)


def main() -> None:
    """Command line; each measurement has a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--measure", nargs=3, metavar=("ROLE", "PRECISION", "SAMPLES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        role, precision, samples = options.measure
        measure(role, precision, Path(samples), options.rows)
        return

    from avrt_lib.config import load
    from avrt_lib.steps import run_step

    few = {"data.train.count": options.rows, "data.validation.count": 10, "data.test.count": 10}
    with tempfile.TemporaryDirectory(prefix="avrt-bench-") as folder:
        samples = Path(folder) / "samples"
        run_step("ingest", config=load(CONFIG, few), inputs={}, outputs={"samples": samples}, params={"data_hash": ""})
        for role in ("vision", "audio"):
            for precision in PRECISIONS:
                command = [sys.executable, __file__, "--rows", str(options.rows)]
                done = subprocess.run(
                    [*command, "--measure", role, precision, str(samples)], stderr=subprocess.PIPE, text=True
                )
                if done.returncode:
                    sys.exit(done.stderr)


if __name__ == "__main__":
    main()
