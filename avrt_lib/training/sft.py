"""The cold start: supervised training of the student on merged traces, with frozen encoders."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer

from avrt_lib import answers, models, prompts
from avrt_lib.config import Config
from avrt_lib.errors import NothingKeptError
from avrt_lib.records import LETTERS, Merged, Sample
from avrt_lib.tables import read_rows
from avrt_lib.training import checkpoints, export, loop, student
from avrt_lib.training.encoding import Encoder, collate_targets, has_modality
from avrt_lib.training.epochs import epochs
from avrt_lib.training.stop_rule import StopRule
from avrt_lib.training.validation import are_correct, write_greedily
from avrt_lib.workspace import Workspace

#: A question type with at least this share of the validation questions counts by itself.
_COMMON = 0.15
#: A type with a smaller share of the rows than this is weighted as if it had this share.
_RARE = 0.1
_METRICS = {"loss": "loss", "mean_token_accuracy": "token accuracy"}
#: Section tags of a teacher's own format that its reasoning may still hold.
_TEACHER_TAGS = re.compile(r"</?[A-Z]{3,}>")


@dataclass(frozen=True)
class Example:
    """A training row: the sample and its target text in each condition that it can be trained in."""

    sample: Sample
    targets: dict[str, str]


def run(config: Config, *, workspace: Workspace, samples: Path, merged: Path, model: Path) -> dict[str, Any]:
    """Train the student on merged traces and write it as a servable model folder.

    Args:
        config: the run's configuration; read are ``student``, ``sft``, ``seed``, ``evaluation.max_tokens`` and
            ``store.kind``.
        workspace: checkpoints go to its scratch and to the run's store; a step that was killed goes on from the newest
            whole one.
        samples: table of samples.
        merged: table of merged traces; rows with a reasoning are trained on.
        model: the folder to write.

    Returns:
        ``steps``, ``loss`` (of the last logged steps), ``validation_accuracy``, ``stopped`` (``band``, ``above_band``
        or ``steps``), ``seconds`` (of this process), ``rows``, ``history`` of ``{step, loss, accuracy}``,
        ``weight_change`` and ``frozen_sha256``.

    Raises:
        NothingKeptError: where no row has a reasoning.
        TrainingError: where no step was made, the loss is not finite, or frozen weights changed.
        InterruptedStep: after SIGTERM; a checkpoint is saved.
    """
    started = time.monotonic()
    section = config.sft
    student.set_threads(section.threads)
    examples = read_examples(samples, merged, target=section.target)
    questions = [s for s in read_rows(samples, Sample, split="validation") if s.answer_index is not None]
    base = models.resolve(config.student.model)
    learner = student.load(base, config.student)
    frozen = student.frozen_sha256(learner)
    encoder = Encoder(learner, config.student)

    rows_per_step = section.per_device_batch * loop.accumulation(section) * loop.world_size()
    steps = loop.steps_for(
        len(examples), section, epochs=section.epochs, max_steps=section.max_steps, rows_per_step=rows_per_step
    )
    order = schedule(
        examples,
        steps * rows_per_step,
        seed=config.seed,
        dropout=section.modality_dropout,
        dropout_types=section.modality_dropout_types,
        vision_only=section.modality_dropout_vision_only,
        balance=section.type_balance,
    )
    folder = workspace.scratch / "checkpoints"
    common = loop.arguments(
        section,
        config.student,
        output=folder,
        learning_rate=section.learning_rate,
        warmup_steps=section.warmup_steps,
        max_steps=steps,
        seed=config.seed,
    )
    arguments = TrlSftConfig(
        **common,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
    )
    sink = checkpoints.sink(config, workspace)
    resume = checkpoints.to_go_on_from(folder, sink)
    with workspace.progress("steps", steps) as bar, checkpoints.Checkpoints(folder, sink) as saver:
        reporting = loop.Reporting(bar, "sft", _METRICS)
        trainer = SFTTrainer(
            model=learner.model,
            args=arguments,
            train_dataset=Dataset.from_dict({"row": [r for r, _ in order], "condition": [c for _, c in order]}),
            data_collator=Collator(examples, encoder),
            processing_class=learner.processor,
            callbacks=[reporting],
        )
        trainer.remove_callback(PrinterCallback)
        validate = _validator(config, learner, encoder, questions, trainer)
        rule = None
        if section.stop_low is not None and questions:

            def report(step: int, accuracy: float) -> None:
                reporting.note(accuracy=accuracy)
                loop.log_metrics({"sft/validation_accuracy": accuracy}, step)

            rule = StopRule(section, validate, report, can_retreat=section.deepspeed == "none")
            trainer.add_callback(rule)
        trainer.add_callback(saver)
        if resume is not None and rule is not None:
            rule.restore(resume)
        checkpoints.train(trainer, saver, resume)
    loop.check_trained(trainer.state)
    student.check_frozen(learner, frozen)
    facts: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "loss": _last_loss(trainer),
        "validation_accuracy": reached(rule, validate),
        "stopped": (rule.outcome if rule is not None else None) or "steps",
        "seconds": time.monotonic() - started,
        "rows": len(examples),
        "history": _history(trainer, rule),
        "frozen_sha256": frozen,
    }
    if trainer.is_world_process_zero():
        change = export.export(
            learner,
            model,
            dtype=export.export_dtype(config.student.dtype),
            instruction=prompts.instruction(config.student.prompt),
            made_by={"step": "sft", "base": config.student.model, "steps": facts["steps"], "config": config.sha256},
        )
        facts["weight_change"] = change.relative_l2
    trainer.accelerator.wait_for_everyone()
    return facts


def read_examples(samples: Path, merged: Path, *, target: str) -> list[Example]:
    """The training rows: every sample of the train split that has a merged reasoning and a label.

    With ``target`` ``answer`` the target is the bare answer of the same rows: the control without traces. Where a
    sample has both modalities, the target for one of them alone is that teacher's own reasoning.

    Raises:
        NothingKeptError: where there is none.
    """
    traces = {row.sample_id: row for row in read_rows(merged, Merged) if row.reasoning.strip()}
    examples = []
    for sample in read_rows(samples, Sample, split="train"):
        trace = traces.get(sample.id)
        if trace is None or sample.answer_index is None:
            continue
        texts = {"av": trace.reasoning}
        if sample.frames and sample.audio is not None:
            texts.update(vision_only=trace.vision_reasoning, audio_only=trace.audio_reasoning)
        if target == "answer":
            bare = f"<answer>{LETTERS[sample.answer_index]}</answer>"
            targets = dict.fromkeys(texts, bare)
        else:
            targets = {
                condition: answers.compose(_in_students_form(text), sample.answer_index)
                for condition, text in texts.items()
                if text.strip()
            }
        examples.append(Example(sample, targets))
    if not examples:
        raise NothingKeptError(
            f"No merged trace in {merged} belongs to a training sample in {samples}, so there is nothing to train on."
        )
    return examples


def _in_students_form(reasoning: str) -> str:
    return re.sub(r" {2,}", " ", _TEACHER_TAGS.sub(" ", reasoning)).strip()


def schedule(
    examples: Sequence[Example],
    count: int,
    *,
    seed: int,
    dropout: float,
    dropout_types: Mapping[str, float] | None = None,
    vision_only: float = 0.5,
    balance: float = 0.0,
) -> list[tuple[int, str]]:
    """Which example stands in which condition at each place of the run, epoch after epoch.

    The order is a function of the arguments alone, so that a resumed run sees what an undisturbed one would. With
    probability ``dropout``, and afresh in each epoch, one modality is taken away (ours; the paper trains on both
    modalities only).

    Args:
        examples: the training rows.
        count: rows of the whole run.
        seed: of the order and the dropout.
        dropout: the share of rows that lose a modality, where they have a target for the other.
        dropout_types: another share for the rows of some question types. A teacher that was right about a question that
            needs both modalities has guessed, which is little to learn.
        vision_only: how often it is the sound that is taken away, and not the sight.
        balance: how far the question types are evened out (ours; the filter keeps few of the types that one modality
            cannot answer): a type of n rows gets a share of an epoch in proportion to n ** (1 - balance), so that above
            1 a rarer type gets more. The rows of a very rare one (below a tenth) are not repeated more than that.

    Returns:
        ``count`` pairs of the example's index and ``av``, ``audio_only`` or ``vision_only``.
    """
    types = [example.sample.question_type for example in examples]
    counts = Counter(types)
    weights = {name: max(count, _RARE * len(examples)) ** -balance for name, count in counts.items()}
    order: list[tuple[int, str]] = []
    for indices, draw in epochs(types, seed=seed, weights=weights):
        for index in indices:
            dropped = draw.random() < (dropout_types or {}).get(types[index], dropout)
            condition = "vision_only" if draw.random() < vision_only else "audio_only"
            usable = dropped and condition in examples[index].targets
            order.append((index, condition if usable else "av"))
        if len(order) >= count:
            break
    return order[:count]


class Collator:
    """Rows of the schedule as a batch of prompts, targets and media.

    TRL's own collators read images only; a prompt with sound would yield no batch at all.
    """

    def __init__(self, examples: Sequence[Example], encoder: Encoder) -> None:
        self.examples = examples
        self.encoder = encoder

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of these rows of the schedule; see ``encoding.collate_targets``."""
        chosen = [(self.examples[row["row"]], row["condition"]) for row in rows]
        prompts = [self.encoder.encode(example.sample, condition) for example, condition in chosen]
        targets = [self.encoder.target(example.targets[condition]) for example, condition in chosen]
        return collate_targets(prompts, targets, self.encoder.student.tokenizer.pad_token_id)


def _validator(
    config: Config, learner: student.Student, encoder: Encoder, questions: list[Sample], trainer: SFTTrainer
) -> Callable[[], tuple[float, float]]:
    """A function that gives the greedy accuracy on the first validation questions, shared out over the processes.

    Its second value is the accuracy of the worst common question type.
    """
    asked = [s for s in questions if has_modality(s, "av", "audio") or has_modality(s, "av", "vision")]
    asked = asked[: config.sft.validation_samples]
    counts = Counter(sample.question_type for sample in asked)
    common = [kind for kind, count in counts.items() if count >= max(_COMMON * len(asked), 1)]

    def validate() -> tuple[float, float]:
        if not asked:
            return 0.0, 0.0
        mine = asked[trainer.accelerator.process_index :: trainer.accelerator.num_processes]
        texts = write_greedily(learner, encoder, mine, max_new_tokens=config.evaluation.max_tokens)
        right = are_correct(texts, mine)
        by_type = [sum(r for r, s in zip(right, mine, strict=True) if s.question_type == kind) for kind in common]
        correct = torch.tensor([sum(right), *by_type], device=trainer.accelerator.device)
        total, *of_types = trainer.accelerator.reduce(correct, reduction="sum").tolist()
        shares = [found / counts[kind] for kind, found in zip(common, of_types, strict=True)]
        return total / len(asked), min(shares, default=0.0)

    return validate


def reached(rule: StopRule | None, validate: Callable[[], tuple[float, float]]) -> float:
    """The accuracy of the weights that are written, which the rule may have gone back to at the last step."""
    known = rule.accuracy if rule is not None else None
    return validate()[0] if known is None else known


def _last_loss(trainer: SFTTrainer) -> float | None:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return float(losses[-1]) if losses else None


def _history(trainer: SFTTrainer, rule: StopRule | None) -> list[dict[str, float | None]]:
    """Losses and validation accuracies by step."""
    rows: dict[int, dict[str, float | None]] = {}
    for entry in loop.log_series(trainer.state, {"loss": "loss"}):
        rows.setdefault(int(entry["step"]), {}).update(loss=entry["loss"])
    for entry in rule.history if rule is not None else []:
        rows.setdefault(int(entry["step"]), {}).update(accuracy=entry["accuracy"])
    return [{"step": s, "accuracy": r.get("accuracy"), "loss": r.get("loss")} for s, r in sorted(rows.items())]
