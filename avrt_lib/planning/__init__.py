"""What a run will take: hours, GPU-hours, pods, memory, disk and cost, with the assumptions that this rests on.

A plan is arithmetic on a configuration, a compiled pipeline and, where there is one, a cluster's profile. Its figures
for GPUs are assumptions until somebody measures them; the miniature's were measured (docs/results.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from avrt_lib.cluster.profile import Profile, amount
from avrt_lib.config import HUB, Config, EngineConfig, GrpoConfig, SftConfig, SourceConfig
from avrt_lib.errors import UsageError
from avrt_lib.models import BUILTIN
from avrt_lib.planning import graph, memory
from avrt_lib.planning.assumptions import Assumption, chosen
from avrt_lib.planning.models import ModelSize, size_of

#: AVQA's 40,127 and 17,208 questions (paper), of which 945 are held out from training; other sources say their count.
AVQA_QUESTIONS = {"train": 39182, "validation": 945, "test": 17208}
_MIB, _GB = 2**20, 1e9
#: Of one row of text in a traces or predictions table.
_ROW_BYTES = 5000


@dataclass(frozen=True, slots=True)
class Need:
    """What one step takes: seconds of work of one of its tasks, how many tasks, and GPUs of each."""

    seconds: float
    tasks: int = 1
    gpus: int = 0
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """The whole estimate; ``to_json`` has it as a document.

    ``wall_s`` is for a pool of ``gpus_at_once``; with fewer GPUs pods wait for each other.
    """

    name: str
    cluster: str | None
    samples: dict[str, int]
    needs: dict[str, Need]
    pods: int
    overhead_s: float
    wall_s: float
    gpus_at_once: int
    memories: list[memory.Memory]
    disk_gb: dict[str, float]
    price: float | None
    assumptions: dict[str, Assumption]
    warnings: list[str] = field(default_factory=list)

    @property
    def gpu_hours(self) -> float:
        """GPUs of every task for as long as it works."""
        return sum(need.seconds * need.tasks * need.gpus for need in self.needs.values()) / 3600

    def to_json(self) -> dict[str, Any]:
        """The plan as a document; hours and GPU-hours with two digits."""
        return {
            "name": self.name,
            "cluster": self.cluster,
            "samples": self.samples,
            "hours": round(self.wall_s / 3600, 2),
            "gpu_hours": round(self.gpu_hours, 2),
            "gpus_at_once": self.gpus_at_once,
            "cost": None if self.price is None else round(self.gpu_hours * self.price, 2),
            "price_per_gpu_hour": self.price,
            "pods": self.pods,
            "pod_overhead_s": round(self.overhead_s),
            "steps": {
                step: {
                    "tasks": need.tasks,
                    "hours_each": round(need.seconds / 3600, 2),
                    "gpus_each": need.gpus,
                    "gpu_hours": round(need.seconds * need.tasks * need.gpus / 3600, 2),
                    "note": need.note,
                }
                for step, need in self.needs.items()
            },
            "memory": [item.to_json() for item in self.memories],
            "disk_gb": {name: round(value, 2) for name, value in self.disk_gb.items()},
            "warnings": self.warnings,
            "assumptions": {name: {"value": a.value, "what": a.what} for name, a in self.assumptions.items()},
        }


def make(
    config: Config,
    spec: Mapping[str, Any],
    *,
    profile: Profile | None = None,
    samples: int | None = None,
    training_gpus: int | None = None,
    gpu_memory_gib: float | None = None,
    price: float | None = None,
    assume: Mapping[str, float] | None = None,
) -> Plan:
    """Estimate a run.

    Args:
        config: the run's configuration.
        spec: its compiled pipeline, from which pods and the order of the steps are read.
        profile: the cluster's; gives GPUs of each pool, their memory and their price.
        samples: training questions; by default what the configuration says, or AVQA has.
        training_gpus: GPUs of a training step; by default the profile's. It runs in as many processes, unless the
            configuration says how many; where neither is known, in eight with ZeRO and in one without.
        gpu_memory_gib: of one GPU of any step; by default that of the step's own pool, or 80.
        price: of one GPU-hour; by default the profile's.
        assume: figures that take the place of assumptions.

    Raises:
        UsageError: where ``assume`` names no assumption, or a number is none to reckon with.
    """
    if gpu_memory_gib is not None and not (math.isfinite(gpu_memory_gib) and gpu_memory_gib > 0):
        raise UsageError(f"--gpu-memory takes GiB above 0, not {gpu_memory_gib:g}.")
    return _Planner(config, profile, samples, training_gpus, gpu_memory_gib, price, assume or {}).plan(spec)


class _Planner:
    def __init__(
        self,
        config: Config,
        profile: Profile | None,
        samples: int | None,
        training_gpus: int | None,
        gpu_memory_gib: float | None,
        price: float | None,
        assume: Mapping[str, float],
    ) -> None:
        self.config = config
        self.profile = profile
        self.miniature = config.student.model.startswith(BUILTIN)
        self.figures = chosen(self.miniature, assume)
        self.given = set(assume)
        self.warnings: list[str] = []
        self.samples = {split: self._count(split) for split in ("train", "validation", "test")}
        if samples is not None:
            self.samples["train"] = samples
        pool = profile.pools["training"] if profile else None
        self.training_gpus = training_gpus or (pool.gpus if pool else 0)
        self.on_gpu = not self.miniature and not (profile is not None and profile.build == "cpu")
        if profile is not None and not self.miniature and not self.on_gpu:
            self.warnings.append(
                f"{profile.name} runs the CPU images: the hours are those of GPUs that it does not have."
            )
        self.processes = {"sft": self._processes("sft", config.sft), "grpo": self._processes("grpo", config.grpo)}
        self.gpu_memory_gib = gpu_memory_gib
        self.price = price if price is not None else (profile.gpu_hour_price if profile else None)
        self.sizes = {reference: self._size(reference) for reference in self._references()}

    def __getitem__(self, name: str) -> float:
        return self.figures[name].value

    def plan(self, spec: Mapping[str, Any]) -> Plan:
        needs = self._needs()
        needed = graph.cost(spec, self["pod_s"], lambda component: _of(needs, component))
        memories = self._memories() if self.on_gpu else []
        self.warnings += filter(None, (item.warning() for item in memories))
        self._check_batches()
        disk = self._disk()
        self._check_training_pool(memories, disk)
        return Plan(
            name=self.config.name,
            cluster=self.profile.name if self.profile else None,
            samples=self.samples,
            needs=needs,
            pods=needed.pods,
            overhead_s=needed.overhead_s,
            wall_s=needed.wall_s,
            gpus_at_once=self._gpus_at_once(needs),
            memories=memories,
            disk_gb=disk,
            price=self.price,
            assumptions=self.figures,
            warnings=self.warnings,
        )

    def _count(self, split: str) -> int:
        data = self.config.data
        source: SourceConfig | None = getattr(data, split) or data.all
        if source is not None and source.count is not None:
            return source.count if getattr(data, split) else round(source.count * self._share(split))
        if source is not None and source.format == "avqa":
            return AVQA_QUESTIONS[split]
        self.warnings.append(f"The {split} questions are not counted: AVQA's number is taken; say --samples.")
        return AVQA_QUESTIONS[split]

    def _share(self, split: str) -> float:
        """The part of ``data.all`` that a split gets."""
        data = self.config.data
        if data.overlap_splits:
            return 1.0
        shares = {"validation": data.validation_share, "test": data.test_share}
        return shares.get(split, 1.0 - sum(shares.values()))

    def _processes(self, step: str, section: SftConfig | GrpoConfig) -> int:
        """How many processes training starts: as many as the configuration says, or one for each GPU."""
        gpus = self.training_gpus
        if section.processes is not None:
            if self.on_gpu and gpus not in (0, section.processes):
                self.warnings.append(f"{step}.processes is {section.processes}, but the step gets {gpus} GPUs.")
            return section.processes
        return gpus or (8 if section.deepspeed != "none" and not self.miniature else 1)

    def _references(self) -> list[str]:
        engines = [e for _, e in self._engines() if e.kind == "vllm"]
        return list(dict.fromkeys([*(engine.model for engine in engines), self.config.student.model]))

    def _engines(self) -> list[tuple[str, EngineConfig]]:
        return [
            ("vision_teacher", self.config.teachers.vision.engine),
            ("audio_teacher", self.config.teachers.audio.engine),
            ("merger", self.config.merger.engine),
        ]

    def _size(self, reference: str) -> ModelSize | None:
        size = size_of(reference)
        if size is None:
            self.warnings.append(f"{reference} neither lies here nor is known: its memory and disk are left out.")
        elif reference.startswith(HUB):
            self.warnings.append(f"{reference} is not pinned yet: `avrt models pull` (docs/models.md).")
        return size

    # Seconds

    def _needs(self) -> dict[str, Need]:
        config, train = self.config, self.samples["train"]
        questions = sum(self.samples.values())
        kept = train * self["kept_share"] if config.merger.keep == "both" else train
        answers = self.samples["validation"] + self.samples["test"] * len(config.evaluation.conditions)
        ingest = questions * self["ingest_s_per_sample"] / config.data.workers
        needs = {name: Need(self["cpu_step_s"]) for name in ("preflight", "data_validation", "promotion", "deployment")}
        needs["ingest"] = Need(ingest, note=f"{questions:,} questions")
        for name, engine, role, rows, tasks in (
            ("vision_teacher", config.teachers.vision.engine, "vision", train, config.teachers.shards),
            ("audio_teacher", config.teachers.audio.engine, "audio", train, config.teachers.shards),
            ("merger", config.merger.engine, "merger", kept, 1),
        ):
            seconds = rows / tasks * self._rate(f"{role}_s_per_sample", role)
            if engine.kind == "endpoint":
                needs[name] = Need(seconds, tasks, 0, "an endpoint's GPUs are not counted")
            else:
                needs[name] = Need(self["engine_start_s"] + seconds, tasks, self._gpus(engine.tensor_parallel_size))
        needs["evaluation"] = Need(
            self["engine_start_s"] + answers * self._rate("answer_s", "answer"),
            3,
            self._gpus(1),
            f"{answers:,} answers of each of three models",
        )
        needs["sft"], needs["grpo"] = self._sft(int(kept)), self._grpo(train)
        return needs

    def _gpus(self, count: int) -> int:
        return count if self.on_gpu else 0

    def _rate(self, name: str, role: str) -> float:
        """Seconds of one engine for one request: measured or given, or by tokens."""
        if name in self.figures:
            return self[name]
        prefill = self[f"{role}_prompt_tokens"] / self["prefill_tokens_per_s"]
        return prefill + self[f"{role}_tokens"] / self[f"{role}_tokens_per_s"]

    def _sft(self, rows: int) -> Need:
        section, processes = self.config.sft, self.processes["sft"]
        batch = section.per_device_batch * section.gradient_accumulation * processes
        steps = _steps(rows, section, batch)
        each = self._step_seconds("sft", batch * self._row_tokens, passes=8.0, offload=section.deepspeed)
        seconds = self["training_start_s"] + steps * each
        gpus = self._gpus(self.training_gpus or processes)
        return Need(seconds, 1, gpus, f"{steps:,} steps of {batch} rows, {each:.1f} s each")

    def _grpo(self, rows: int) -> Need:
        section, processes = self.config.grpo, self.processes["grpo"]
        completions = section.per_device_batch * section.gradient_accumulation * processes
        questions = max(1, completions // section.group_size)
        steps = _steps(rows, section, questions)
        each = self._step_seconds("grpo", completions * self._row_tokens, passes=10.0, offload=section.deepspeed)
        if "grpo_s_per_step" not in self.figures:
            # A process generates its whole batch, or one device batch after another.
            each += self["completion_tokens"] * self["generation_s_per_token"] * section.gradient_accumulation
        seconds = self["training_start_s"] + steps * each
        note = f"{steps:,} steps of {questions} questions x {section.group_size} completions, {each:.1f} s each"
        return Need(seconds, 1, self._gpus(self.training_gpus or processes), note)

    @property
    def _row_tokens(self) -> float:
        return 0.0 if self.miniature else self["answer_prompt_tokens"] + self["answer_tokens"]

    def _step_seconds(self, step: str, tokens: float, *, passes: float, offload: str) -> float:
        """Seconds of an optimizer step.

        ``passes`` is floating-point operations for each parameter and token: 2 forward, 4 backward, 2 to compute
        activations again, and 2 for a reference model.
        """
        if f"{step}_s_per_step" in self.figures:
            return self[f"{step}_s_per_step"]
        size = self.sizes[self.config.student.model]
        parameters = size.parameters if size else 0.0
        flops = passes * parameters * tokens
        speed = self.processes[step] * self["peak_tflops"] * 1e12 * self["training_utilisation"]
        return flops / speed + (self["offload_step_s"] if offload == "zero2_offload" else 0.0)

    # Bytes

    def _memories(self) -> list[memory.Memory]:
        found = []
        for step, engine in self._engines():
            size = self.sizes.get(engine.model)
            if engine.kind == "vllm" and size is not None:
                found.append(self._engine_memory(step, engine, size))
        size = self.sizes[self.config.student.model]
        if size is None:
            return found
        student = self.config.student
        engine = EngineConfig(model="student", dtype=student.dtype, max_model_len=student.max_model_len)
        found.append(self._engine_memory("evaluation", engine, size))
        for step, section, reference in (
            ("sft", self.config.sft, False),
            ("grpo", self.config.grpo, self.config.grpo.kl_beta > 0),
        ):
            found.append(
                memory.of_training(
                    step,
                    self.config,
                    section,
                    size,
                    self._gpu_gib(step),
                    tokens=self._row_tokens,
                    reference=reference,
                    processes=self.processes[step],
                    workspace_gib=self["training_workspace_gib"],
                )
            )
        return found

    def _engine_memory(self, step: str, engine: EngineConfig, size: ModelSize) -> memory.Memory:
        return memory.of_engine(step, engine, size, self._gpu_gib(step), self["engine_workspace_gib"])

    def _gpu_gib(self, step: str) -> float:
        """Memory of one GPU of the pool that a step's pods go to."""
        pool = self.profile.pool(step) if self.profile else None
        return self.gpu_memory_gib or (pool.gpu_memory_gib if pool else None) or 80.0

    def _disk(self) -> dict[str, float]:
        """GB on the artifact store and the pods' scratch, by what they hold."""
        questions = sum(self.samples.values())
        disk = {
            "models": sum(size.disk_bytes for size in self.sizes.values() if size),
            "samples, in scratch and as artifact": 2 * questions * self["sample_mib"] * _MIB,
            "traces and predictions": _ROW_BYTES * (3 * self.samples["train"] + 9 * self.samples["test"]),
        }
        size = self.sizes[self.config.student.model]
        if size is not None:
            lora = self.config.student.lora
            weight = 4.0 if self.config.student.dtype == "float32" else 2.0
            trained = size.adapter_parameters(lora.rank) if lora else size.language
            whole = 0.0 if lora else size.parameters * weight
            disk["students, as artifact and published"] = 4 * size.parameters * weight
            disk["training checkpoints"] = self["checkpoints_kept"] * (whole + 12.0 * trained)
        return {name: value / _GB for name, value in disk.items()}

    def _check_batches(self) -> None:
        grpo = self.config.grpo
        completions = grpo.per_device_batch * grpo.gradient_accumulation * self.processes["grpo"]
        if completions % grpo.group_size:
            self.warnings.append(f"grpo: {completions} completions a step are not whole groups of {grpo.group_size}.")
        if self.profile is None or not self.on_gpu:
            return
        for step, engine in self._engines():
            gpus, wanted = self.profile.pool(step).gpus, engine.tensor_parallel_size
            if engine.kind == "vllm" and wanted > gpus:
                self.warnings.append(f"{step} spreads over {wanted} GPUs, but pods of its pool get {gpus}.")

    def _check_training_pool(self, memories: Sequence[memory.Memory], disk: Mapping[str, float]) -> None:
        """Compare a training pod's memory and scratch with what its pool gives it."""
        if self.profile is None:
            return
        pool = self.profile.pools["training"]
        for item in memories:
            if pool.memory_limit and item.host_gib * memory.GIB > amount(pool.memory_limit):
                self.warnings.append(
                    f"{item.step} needs {item.host_gib:.0f} GiB of its host, but a pod of its pool gets "
                    f"{pool.memory_limit}."
                )
        checkpoints = disk.get("training checkpoints", 0.0) * _GB
        if pool.scratch and checkpoints > amount(pool.scratch):
            self.warnings.append(
                f"Training checkpoints take {checkpoints / _GB:.0f} GB, but the pool's scratch has {pool.scratch}."
            )

    def _gpus_at_once(self, needs: Mapping[str, Need]) -> int:
        """GPUs of the widest moment: both teachers' shards, or a training step."""
        teachers = needs["vision_teacher"].gpus + needs["audio_teacher"].gpus
        training = max(needs["sft"].gpus, needs["grpo"].gpus)
        return max(min(self.config.teachers.parallelism, self.config.teachers.shards) * teachers, training)


def _steps(rows: int, section: SftConfig | GrpoConfig, rows_per_step: int) -> int:
    """Optimizer steps, as training counts them (``training.loop.steps_for``, which needs torch)."""
    steps = max(1, math.ceil(rows * section.epochs / rows_per_step))
    return min(steps, section.max_steps) if section.max_steps is not None else steps


def _of(needs: Mapping[str, Need], component: str) -> float:
    """A component's work; names in a compiled pipeline have dashes, and a number where a component is used again."""
    name = component.replace("-", "_")
    while name and name not in needs and "_" in name:
        head, _, tail = name.rpartition("_")
        if not tail.isdigit():
            break
        name = head
    need = needs.get(name)
    return need.seconds if need is not None and math.isfinite(need.seconds) else 0.0
