"""Group-relative policy optimisation of the cold-started student, on every training question that has a label."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig as TrlGrpoConfig

from avrt_lib import prompts
from avrt_lib.config import Config
from avrt_lib.errors import ConfigError, NothingKeptError
from avrt_lib.records import Sample
from avrt_lib.tables import read_rows
from avrt_lib.training import checkpoints, export, loop, rewards, student
from avrt_lib.training.encoding import Encoder
from avrt_lib.training.epochs import epochs
from avrt_lib.training.grpo_trainer import AudioVisualGrpoTrainer, Prompt
from avrt_lib.workspace import Workspace

_METRICS = {
    "reward": "reward",
    "rewards/format_reward/mean": "format",
    "rewards/accuracy_reward/mean": "accuracy",
    "rewards/length_reward/mean": "length",
    "frac_reward_zero_std": "uninformative",
    "kl": "kl",
    "completions/mean_length": "tokens",
    "completions/clipped_ratio": "cut off",
    "entropy": "entropy",
}
_NOTES = {name: _METRICS[name] for name in ("reward", "rewards/accuracy_reward/mean", "kl")}


def run(config: Config, *, workspace: Workspace, samples: Path, sft_model: Path, model: Path) -> dict[str, Any]:
    """Train the cold-started student by GRPO and write it as a servable model folder.

    Args:
        config: the run's configuration; read are ``student``, ``grpo``, ``seed`` and ``store.kind``.
        workspace: checkpoints go to its scratch and to the run's store; a step that was killed goes on from the newest
            whole one.
        samples: table of samples; the whole train split is used, not only what the teachers' filter kept.
        sft_model: the model to start from, which is also the reference of the KL term.
        model: the folder to write.

    Returns:
        ``steps``, ``informative_groups`` (mean share of groups whose rewards differ), ``kl`` (mean of the last logged
        steps; None with ``kl_beta`` 0), ``weight_change`` (relative L2 norm over the trained weights), ``reward_first``
        and ``reward_last``, ``rows``, ``seconds`` (of this process), ``history`` and ``frozen_sha256``.

    Raises:
        NothingKeptError: where no training sample has a label.
        ConfigError: where the batch does not hold whole groups.
        TrainingError: where no step was made, the loss is not finite, media were lost, or frozen weights changed.
        InterruptedStep: after SIGTERM; a checkpoint is saved.
    """
    started = time.monotonic()
    section = config.grpo
    student.set_threads(section.threads)
    rows = read_questions(samples)
    learner = student.load(sft_model, config.student)
    frozen = student.frozen_sha256(learner)
    encoder = Encoder(learner, config.student)
    reference = student.load(sft_model, config.student, adapters=False).model if section.kl_beta > 0 else None

    completions = section.per_device_batch * loop.accumulation(section) * loop.world_size()
    if completions % section.group_size:
        raise ConfigError(
            f"grpo: {completions} completions a step (per_device_batch x gradient_accumulation x processes) are not "
            f"whole groups of group_size {section.group_size}."
        )
    questions = completions // section.group_size
    steps = loop.steps_for(
        len(rows), section, epochs=section.epochs, max_steps=section.max_steps, rows_per_step=questions
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
    arguments = TrlGrpoConfig(
        **common,
        num_generations=section.group_size,
        max_completion_length=section.max_completion_tokens,
        temperature=section.temperature,
        epsilon=section.clip_epsilon,
        beta=section.kl_beta,
        loss_type="grpo",
        scale_rewards="group",
        shuffle_dataset=False,  # its order is the run's
        # A media token that is sampled would ask for features that do not exist.
        generation_kwargs={"suppress_tokens": learner.media_token_ids},
    )

    def encode(row: int, step: int) -> Prompt:
        sample = rows[row]
        return encoder.encode(sample, condition(sample, step, seed=config.seed, dropout=section.modality_dropout))

    sink = checkpoints.sink(config, workspace)
    resume = checkpoints.to_go_on_from(folder, sink)
    with workspace.progress("steps", steps) as bar, checkpoints.Checkpoints(folder, sink) as saver:
        trainer = AudioVisualGrpoTrainer(
            encode=encode,
            reference=reference,
            model=learner.model,
            args=arguments,
            reward_funcs=rewards.rewards(section.reward),
            train_dataset=dataset(rows, config, questions=steps * questions),
            processing_class=learner.processor,
            callbacks=[loop.Reporting(bar, "grpo", _NOTES), saver],
        )
        trainer.remove_callback(PrinterCallback)
        checkpoints.train(trainer, saver, resume)
    loop.check_trained(trainer.state)
    student.check_frozen(learner, frozen)
    history = loop.log_series(trainer.state, _METRICS)
    facts: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "rows": len(rows),
        "informative_groups": 1.0 - _mean([row["uninformative"] for row in history if "uninformative" in row]),
        "kl": next((row["kl"] for row in reversed(history) if "kl" in row), None),
        "reward_first": next((row["reward"] for row in history if "reward" in row), None),
        "reward_last": next((row["reward"] for row in reversed(history) if "reward" in row), None),
        "seconds": time.monotonic() - started,
        "history": history,
        "frozen_sha256": frozen,
    }
    if trainer.is_world_process_zero():
        change = export.export(
            learner,
            model,
            dtype=export.export_dtype(config.student.dtype),
            instruction=prompts.instruction(config.student.prompt),
            made_by={"step": "grpo", "base": config.student.model, "steps": facts["steps"], "config": config.sha256},
        )
        facts["weight_change"] = change.relative_l2
    trainer.accelerator.wait_for_everyone()
    return facts


def read_questions(samples: Path) -> list[Sample]:
    """Every sample of the train split with a label and at least one medium.

    Raises:
        NothingKeptError: where there is none.
    """
    rows = [
        sample
        for sample in read_rows(samples, Sample, split="train")
        if sample.answer_index is not None and (sample.frames or sample.audio is not None)
    ]
    if not rows:
        raise NothingKeptError(f"No training sample in {samples} has a label, so GRPO has nothing to reward.")
    return rows


def condition(sample: Sample, step: int, *, seed: int, dropout: float) -> str:
    """What the prompt of a question holds at a step: ``av``, or with probability ``dropout`` one modality only.

    Ours: policies that always get both forget how to end an answer without one of them. It depends on the arguments
    alone, so that a group's completions, which may be those of several processes, and a resumed run agree.
    """
    draw = random.Random(f"{seed}/{step}/{sample.id}")
    if draw.random() >= dropout or not sample.frames or sample.audio is None:
        return "av"
    return draw.choice(("audio_only", "vision_only"))


def dataset(rows: Sequence[Sample], config: Config, *, questions: int) -> Dataset:
    """What TRL sees of a whole run: each question as text, and what the rewards need. Media stay outside of Arrow.

    Args:
        rows: the training questions.
        config: read are ``student.prompt``, ``seed`` and ``grpo.type_weights``.
        questions: how many the run asks; epochs of the rows follow one another until there are so many.
    """
    texts = [prompts.question_prompt("student", config.student.prompt, s.question, s.options) for s in rows]
    types = [sample.question_type for sample in rows]
    passes = epochs(types, seed=config.seed, weights=config.grpo.type_weights)
    order = list(islice(chain.from_iterable(indices for indices, _ in passes), questions))
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": texts[i]}] for i in order],
            "row": order,
            "options": [rows[i].options for i in order],
            "answer_index": [rows[i].answer_index for i in order],
        }
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 1.0
