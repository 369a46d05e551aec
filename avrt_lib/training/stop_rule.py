"""When the cold start ends: at the first validation accuracy inside a band, reached by going back if it is overshot.

A shortcut that answers one question type wholly and another by guessing may lie inside the band as well, and GRPO does
not find its way out of it: so the worst of the common types must be accurate enough too.

GRPO learns from groups whose rewards differ, so the student that it starts from must be neither lost nor done (our
rule; the paper trains one epoch). Accuracy on the validation split can jump within a few steps, so a jump over the band
puts weights and optimizer back to the last validation, and goes on from there with half the learning rate and twice
as many validations. The data are not rewound: steps keep counting, and the cap on the steps holds.

At a full learning rate accuracy swings from one step to the next, so that a band may be met by chance. With
``cooldown_from`` the rate falls to nothing first (the decay of a warmup-stable-decay schedule, begun by the accuracy
and not at a step that was set beforehand), and only what is validated while it falls may stop. Where it has fallen to
nothing below the band, training goes on at the full rate.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from avrt_lib.config import SftConfig
from avrt_lib.training.checkpoints import PREFIX, Finished

log = logging.getLogger("avrt")

STATE = "stop_rule.pt"
#: What a checkpoint holds of the rule.
KEPT = ("history", "outcome", "interval", "next_step", "retreats", "snapshot", "cooldown_left")
MAX_RETREATS = 6


class StopRule(TrainerCallback):
    """Validates every few steps and stops, goes on or goes back.

    Args:
        config: the SFT section, with ``stop_low`` set.
        validate: the accuracy of the model as it is now, of all questions and of the worst common question type.
        report: told each accuracy.
        can_retreat: whether weights and optimizer can be put back; under DeepSpeed, which owns both, the rule only
            stops.

    Attributes:
        history: ``{"step", "accuracy"}`` of each validation.
        outcome: why training ended (``band``, ``above_band``), or None where the steps ran out first.
    """

    def __init__(
        self,
        config: SftConfig,
        validate: Callable[[], tuple[float, float]],
        report: Callable[[int, float], None],
        *,
        can_retreat: bool = True,
    ) -> None:
        self.config = config
        self.validate = validate
        self.report = report
        self.can_retreat = can_retreat
        self.history: list[dict[str, float]] = []
        self.outcome: str | None = None
        self.interval = config.validate_every_steps
        self.next_step = self.interval
        self.retreats = 0
        self.snapshot: dict[str, Any] | None = None
        self.cooldown_left: int | None = None

    @property
    def accuracy(self) -> float | None:
        """The accuracy of the weights that the model has now; None where they were not validated."""
        if self.outcome is None and self.snapshot is not None:
            known: float | None = self.snapshot["accuracy"]
            return known
        return self.history[-1]["accuracy"] if self.history else None

    def restore(self, checkpoint: Path) -> None:
        """Take the rule's state up from a checkpoint."""
        saved = torch.load(checkpoint / STATE, weights_only=True)
        for name in KEPT:
            setattr(self, name, saved[name])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the rule's state into the checkpoint."""
        if state.is_world_process_zero:
            values = {name: getattr(self, name) for name in KEPT}
            torch.save(values, Path(args.output_dir or ".") / f"{PREFIX}{state.global_step}" / STATE)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Remember the start, so that even the first validation can go back.

        Raises:
            Finished: where training had ended before it was interrupted.
        """
        if self.outcome is not None:
            raise Finished
        if self.snapshot is None and self.can_retreat:
            self.snapshot = _take(model, optimizer, accuracy=None)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> TrainerControl:
        """Cool down, validate where it is time, and stop, go on or go back."""
        last, cooling = state.global_step >= state.max_steps, self.cooldown_left is not None
        if self.cooldown_left is not None:
            self.cooldown_left -= 1
            self._cool(optimizer, lr_scheduler)
        if state.global_step < self.next_step and self.cooldown_left != 0 and not last:
            return control
        accuracy, worst = self.validate()
        self.history.append({"step": state.global_step, "accuracy": accuracy})
        self.report(state.global_step, accuracy)
        log.info("validation accuracy %.3f, worst type %.3f, at step %d", accuracy, worst, state.global_step)
        low, high, start = self.config.stop_low or 0.0, self.config.stop_high, self.config.cooldown_from
        # A shortcut may lie above the band too: going back would only keep it.
        good = accuracy >= low and worst >= self.config.stop_type_low
        if good and accuracy > high and self.can_retreat and self.retreats < MAX_RETREATS:
            self._retreat(model, optimizer, lr_scheduler)
        elif good and (start is None or cooling or last or accuracy > high):
            self.outcome = "above_band" if accuracy > high else "band"
            control.should_training_stop = True
        else:
            if self.cooldown_left == 0:
                self.cooldown_left = None
                _set_rates(optimizer, lr_scheduler, 1.0)
            elif start is not None and accuracy >= start and not cooling:
                self.cooldown_left = self.config.cooldown_steps
                self._cool(optimizer, lr_scheduler)
            if self.can_retreat:
                self.snapshot = _take(model, optimizer, accuracy=accuracy)
        self.next_step = state.global_step + self.interval
        return control

    def _cool(self, optimizer: Any, lr_scheduler: Any) -> None:
        assert self.cooldown_left is not None
        _set_rates(optimizer, lr_scheduler, self.cooldown_left / (self.config.cooldown_steps + 1))

    def _retreat(self, model: Any, optimizer: Any, lr_scheduler: Any) -> None:
        assert self.snapshot is not None
        self.cooldown_left = None
        self.retreats += 1
        self.interval = max(1, self.interval // 2)
        _put_back(model, optimizer, self.snapshot)
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
        scheduler.base_lrs = [rate / 2 for rate in scheduler.base_lrs]
        # The scheduler sets the rate after each step; until then the snapshot's, which knows nothing of the halving,
        # would hold.
        _set_rates(optimizer, lr_scheduler, 1.0)
        log.info("above the band: back to accuracy %s, half the learning rate", self.snapshot["accuracy"])


def _set_rates(optimizer: Any, lr_scheduler: Any, share: float) -> None:
    """Use this share of the schedule's rates in the next step."""
    scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
    curves = zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, base, curve in curves:
        group["lr"] = share * base * curve(scheduler.last_epoch)


def _trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _take(model: Any, optimizer: Any, *, accuracy: float | None) -> dict[str, Any]:
    """A copy of the trainable weights and the optimizer's state in the host's memory."""
    weights = {name: p.detach().to("cpu", copy=True) for name, p in _trainable(model).items()}
    return {
        "weights": weights,
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "rng": torch.get_rng_state(),
        "accuracy": accuracy,
    }


def _put_back(model: Any, optimizer: Any, snapshot: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, parameter in _trainable(model).items():
            parameter.copy_(snapshot["weights"][name])
    optimizer.load_state_dict(copy.deepcopy(snapshot["optimizer"]))
    torch.set_rng_state(snapshot["rng"])
