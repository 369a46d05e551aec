"""Checkpointing of activations: the same gradients, and none that run through frozen encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from avrt_lib.config import StudentConfig

torch = pytest.importorskip("torch")

from avrt_lib.training import encoding, student  # noqa: E402
from tests import tiny_models  # noqa: E402

ENCODERS = ["visual", "audio_tower"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_student(tmp_path_factory.mktemp("student") / "base", layers=2)


def gradients(folder: Path, config: StudentConfig, *, checkpointing: bool) -> tuple[dict[str, Any], dict[str, bool]]:
    """The parameters' gradients after one batch, and of each encoder whether gradients ran through what it gives."""
    torch.manual_seed(0)
    learner = student.load(folder, config)
    encoder = encoding.Encoder(learner, config)
    batch = encoding.collate_targets(
        [encoder.encode(tiny_models.sample(number)) for number in range(2)],
        [encoder.target("a red light"), encoder.target("a low tone")],
        learner.tokenizer.pad_token_id,
    )
    ran: dict[str, bool] = {}
    for name in ENCODERS:
        blocks = getattr(learner.model, name)
        blocks = blocks.blocks if name == "visual" else blocks.layers

        def see(module: Any, args: Any, output: Any, name: str = name) -> None:
            ran[name] = bool((output[0] if isinstance(output, tuple) else output).requires_grad)

        blocks[-1].register_forward_hook(see)
    learner.model.train()
    if checkpointing:
        learner.model.gradient_checkpointing_enable({"use_reentrant": False})
    learner.model(**batch).loss.backward()
    found = {name: value.grad for name, value in learner.model.named_parameters() if value.grad is not None}
    return found, ran


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8.0, "dropout": 0.0}], ids=["all weights", "adapters"])
def test_frozen_encoders_are_left_out_of_the_backward_pass(base: Path, lora: dict[str, Any] | None) -> None:
    config = StudentConfig.model_validate(student_section(base, freeze=ENCODERS, lora=lora))
    plain, _ = gradients(base, config, checkpointing=False)
    found, ran = gradients(base, config, checkpointing=True)
    assert ran == {"visual": False, "audio_tower": False}
    assert found.keys() == plain.keys()
    assert all(torch.allclose(found[name], plain[name], atol=1e-6) for name in plain)
    # Adapters' second factors start at zero, so that the first ones have no gradient yet.
    assert any(float(value.abs().sum()) > 0 for value in found.values())


def test_encoders_that_are_trained_get_gradients(base: Path) -> None:
    config = StudentConfig.model_validate(student_section(base, freeze=[], lora=None))
    found, ran = gradients(base, config, checkpointing=True)
    assert ran == {"visual": True, "audio_tower": True}
    assert {name for name in ENCODERS if any(key.startswith(name + ".") for key in found)} == set(ENCODERS)


def student_section(base: Path, **changes: Any) -> dict[str, Any]:
    return {**tiny_models.config(base).student.model_dump(mode="json"), **changes}
