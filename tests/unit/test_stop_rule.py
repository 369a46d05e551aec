"""When the cold start stops: in the band, by going back where it was overshot, and by its cap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from avrt_lib import compat

torch = pytest.importorskip("torch")
compat.apply()  # torchvision beside a CPU build of torch

from transformers import TrainerControl, TrainerState, TrainingArguments  # noqa: E402

from avrt_lib.config import SftConfig  # noqa: E402
from avrt_lib.training import sft  # noqa: E402
from avrt_lib.training.checkpoints import Finished  # noqa: E402
from avrt_lib.training.stop_rule import MAX_RETREATS, StopRule  # noqa: E402

BAND = SftConfig(stop_low=0.6, stop_high=0.8, stop_type_low=0.5, validate_every_steps=4)
COOLED = BAND.model_copy(update={"cooldown_from": 0.5, "cooldown_steps": 3})


class Run:
    """A real optimizer and scheduler on one weight that grows by a step of 1, and the rule that watches it."""

    def __init__(
        self,
        accuracies: Sequence[float],
        *,
        worst: Sequence[float] | None = None,
        can_retreat: bool = True,
        folder: Path | None = None,
        config: SftConfig = BAND,
        max_steps: int = 100,
    ) -> None:
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.seen: list[float] = []
        answers: Iterator[tuple[float, float]] = zip(accuracies, worst or accuracies, strict=True)
        self.rule = StopRule(config, lambda: next(answers), lambda step, value: self.seen.append(value),
                             can_retreat=can_retreat)  # fmt: skip
        self.arguments = TrainingArguments(output_dir=str(folder or "unused"), report_to=[], use_cpu=True)
        self.state = TrainerState(max_steps=max_steps)
        self.control = TrainerControl()
        self.rule.on_train_begin(self.arguments, self.state, self.control, **self.objects)

    @property
    def objects(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "lr_scheduler": self.scheduler}

    def step(self) -> bool:
        """One optimizer step; True where training is told to stop."""
        self.optimizer.zero_grad()
        (-self.model.weight.sum()).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.state.global_step += 1
        self.rule.on_step_end(self.arguments, self.state, self.control, **self.objects)
        return bool(self.control.should_training_stop)

    def until_stop(self, limit: int = 100) -> int:
        while self.state.global_step < limit and not self.step():
            pass
        return int(self.state.global_step)


def test_it_stops_at_the_first_validation_inside_the_band() -> None:
    run = Run([0.2, 0.5, 0.7])
    assert run.until_stop() == 12
    assert run.rule.outcome == "band"
    assert run.seen == [0.2, 0.5, 0.7]
    assert run.rule.accuracy == 0.7


def test_a_question_type_that_is_guessed_keeps_it_going() -> None:
    run = Run([0.7, 0.75, 0.7], worst=[0.3, 0.49, 0.5])
    assert run.until_stop() == 12
    assert run.rule.outcome == "band"


def test_a_shortcut_above_the_band_is_not_gone_back_from() -> None:
    run = Run([0.7, 0.9, 0.75], worst=[0.3, 0.4, 0.6])
    assert run.until_stop() == 12
    assert run.model.weight.item() == pytest.approx(12.0)
    assert run.rule.outcome == "band"


def test_a_jump_over_the_band_goes_back_and_takes_smaller_steps() -> None:
    run = Run([0.5, 0.9, 0.7])
    for _ in range(8):
        run.step()
    assert run.model.weight.item() == pytest.approx(4.0)  # the weight of the validation before the jump
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    assert run.until_stop() == 10  # validated twice as often from then on
    assert run.model.weight.item() == pytest.approx(5.0)
    assert run.rule.outcome == "band"


def test_it_goes_back_a_bounded_number_of_times() -> None:
    run = Run([0.9] * (MAX_RETREATS + 1))
    run.until_stop()
    assert run.rule.outcome == "above_band"
    assert len(run.seen) == MAX_RETREATS + 1


def test_without_going_back_a_jump_ends_training() -> None:
    run = Run([0.5, 0.9], can_retreat=False)
    assert run.until_stop() == 8
    assert run.rule.outcome == "above_band"
    assert run.model.weight.item() == pytest.approx(8.0)


def test_its_state_survives_a_checkpoint(tmp_path: Path) -> None:
    run = Run([0.5, 0.9], folder=tmp_path)
    for _ in range(8):
        run.step()
    (tmp_path / "checkpoint-8").mkdir()
    run.rule.on_save(run.arguments, run.state, run.control)
    fresh = Run([0.7])
    fresh.rule.restore(tmp_path / "checkpoint-8")
    assert (fresh.rule.interval, fresh.rule.next_step, fresh.rule.retreats) == (2, 10, 1)
    assert fresh.rule.history == run.rule.history
    assert fresh.rule.accuracy == 0.5


def test_training_that_had_ended_is_not_gone_on_with(tmp_path: Path) -> None:
    run = Run([0.7], folder=tmp_path)
    assert run.until_stop() == 4
    (tmp_path / "checkpoint-4").mkdir()
    run.rule.on_save(run.arguments, run.state, run.control)
    fresh = Run([0.7])
    fresh.rule.restore(tmp_path / "checkpoint-4")
    with pytest.raises(Finished):
        fresh.rule.on_train_begin(fresh.arguments, fresh.state, fresh.control, **fresh.objects)


@pytest.mark.parametrize(("accuracies", "expected"), [([0.5, 0.9], 0.5), ([0.5, 0.55], 0.55), ([0.5, 0.7], 0.7)])
def test_what_is_reported_is_the_accuracy_of_the_weights_that_are_written(
    accuracies: list[float], expected: float
) -> None:
    run = Run(accuracies)
    run.state.max_steps = 8
    run.until_stop(8)
    assert sft.reached(run.rule, lambda: (0.0, 0.0)) == expected


def test_weights_that_were_never_validated_are_validated_for_the_report() -> None:
    run = Run([0.9])
    run.state.max_steps = 4
    run.until_stop(4)
    assert run.model.weight.item() == pytest.approx(0.0)
    assert sft.reached(run.rule, lambda: (0.25, 0.0)) == 0.25


def test_the_rate_falls_to_nothing_before_the_band_decides() -> None:
    run = Run([0.4, 0.7, 0.75], config=COOLED)
    assert run.until_stop() == 11  # the cooldown's end, not the validation inside the band at step 8
    assert run.model.weight.item() == pytest.approx(8 + 0.75 + 0.5 + 0.25)
    assert run.rule.outcome == "band"
    assert run.rule.accuracy == 0.75


def test_a_long_cooldown_stops_where_it_meets_the_band() -> None:
    run = Run([0.7, 0.55, 0.75], config=COOLED.model_copy(update={"cooldown_steps": 99}))
    assert run.until_stop() == 12
    assert run.model.weight.item() == pytest.approx(4 + sum(left / 100 for left in range(92, 100)))


def test_a_cooldown_that_ends_below_the_band_goes_on_at_the_full_rate() -> None:
    run = Run([0.5, 0.55, 0.65, 0.7], config=COOLED)
    for _ in range(7):
        run.step()
    assert run.seen == [0.5, 0.55]
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(1.0)
    assert run.until_stop() == 14  # validated after four steps, and cooled down once more
    assert run.model.weight.item() == pytest.approx(2 * (4 + 1.5))


def test_a_cooldown_that_ends_above_the_band_goes_back_to_its_start() -> None:
    run = Run([0.7, 0.9, 0.7, 0.7], config=COOLED)
    for _ in range(7):
        run.step()
    assert run.model.weight.item() == pytest.approx(4.0)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    assert run.until_stop() == 7 + 2 + 2  # validated twice as often from then on
    assert run.model.weight.item() == pytest.approx(4 + 0.5 * (2 + 0.75 + 0.5))
    assert run.rule.outcome == "band"


def test_a_question_type_that_is_guessed_is_guessed_after_a_cooldown_too() -> None:
    run = Run([0.7, 0.75, 0.7, 0.7], worst=[0.6, 0.4, 0.6, 0.6], config=COOLED)
    assert run.until_stop() == 14


def test_steps_that_run_out_end_a_cooldown() -> None:
    run = Run([0.7, 0.75], config=COOLED, max_steps=6)
    assert run.until_stop() == 6
    assert run.rule.outcome == "band"
    assert run.seen == [0.7, 0.75]


def test_a_cooldown_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    run = Run([0.7, 0.75], config=COOLED, folder=tmp_path)
    for _ in range(5):
        run.step()
    (tmp_path / "checkpoint-5").mkdir()
    run.rule.on_save(run.arguments, run.state, run.control)
    resumed = Run([0.75], config=COOLED)
    resumed.state.global_step = 5
    resumed.rule.restore(tmp_path / "checkpoint-5")
    resumed.optimizer.load_state_dict(run.optimizer.state_dict())
    resumed.scheduler.load_state_dict(run.scheduler.state_dict())
    assert resumed.until_stop() == 7
    assert resumed.model.weight.item() == pytest.approx(0.5 + 0.25)
