"""Training with adapters on a tiny Omni student: they alone learn, survive a kill, and are merged into the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from avrt_lib.config import Config
from avrt_lib.errors import ConfigError
from avrt_lib.models import verify_manifest
from avrt_lib.steps import run_step

torch = pytest.importorskip("torch")

from tests import tiny_models  # noqa: E402

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_student(tmp_path_factory.mktemp("student") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    samples, merged = tiny_models.write_data(tmp_path_factory.mktemp("data"), train=16)
    return {"samples": str(samples), "merged": str(merged)}


@pytest.fixture(scope="module")
def trained(base: Path, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A model after a few steps of SFT with adapters, and the step's facts; its work folder stands beside it."""
    folder = tmp_path_factory.mktemp("trained")
    facts = run_step("sft", config=config(base), inputs=data, outputs={"model": folder / "model"}, work=folder / "work")
    return folder / "model", facts


def config(base: Path, lora: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
    sections.setdefault("sft", {"max_steps": 6, "epochs": 10, "save_every_steps": 3})
    document = tiny_models.config(base, **sections).model_dump(mode="json")
    document["student"]["lora"] = lora or LORA
    return Config.model_validate(document)


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_adapters_lower_the_loss(trained: tuple[Path, dict[str, Any]]) -> None:
    losses = [row["loss"] for row in trained[1]["history"] if row["loss"] is not None]
    assert losses[-1] < losses[0]


def test_the_export_has_the_bases_tensors_and_no_others(base: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    verify_manifest(trained[0])
    assert set(tensors(base)) == set(tensors(trained[0]))


def test_only_the_adapted_layers_of_the_language_model_change(base: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    before, after = tensors(base), tensors(trained[0])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n in before if n.startswith("thinker.model.layers.") and n.endswith("_proj.weight")}


def test_a_checkpoint_holds_the_adapters_alone(trained: tuple[Path, dict[str, Any]]) -> None:
    (checkpoint,) = (trained[0].parent / "work").glob("scratch/sft/*/checkpoints/checkpoint-6")
    names = set(tensors(checkpoint))
    assert names
    assert all(".lora_" in name for name in names)


def test_training_goes_on_from_a_checkpoint_to_the_same_weights(
    base: Path, data: dict[str, str], trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    import shutil

    work = trained[0].parent / "work"
    shutil.copytree(work, tmp_path / "work")
    (scratch,) = (tmp_path / "work" / "scratch" / "sft").iterdir()
    for name in ("done.json", "model", "checkpoints/checkpoint-6"):  # as a kill after step 3 would leave it
        path = scratch / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_step("sft", config=config(base), inputs=data, outputs={"model": tmp_path / "model"}, work=tmp_path / "work")
    first, second = tensors(trained[0]), tensors(tmp_path / "model")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_export_answers_as_the_adapted_model_does(base: Path) -> None:
    from avrt_lib.training import student as students

    learner = students.load(base, config(base).student)
    for name, parameter in learner.model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    plain = students.load(base, config(base).student, adapters=False)
    ids = torch.arange(20).unsqueeze(0)
    learner.model.eval()
    plain.model.eval()
    with torch.no_grad():
        adapted = learner.model(input_ids=ids).logits
        assert not torch.allclose(adapted, plain.model(input_ids=ids).logits, atol=1e-3)
        plain.model.load_state_dict(students.merged_state(learner.model))
        assert torch.allclose(adapted, plain.model(input_ids=ids).logits, atol=1e-4)


def test_grpo_with_adapters_starts_at_no_distance_from_its_reference(
    base: Path, data: dict[str, str], tmp_path: Path
) -> None:
    settings = config(
        base,
        grpo={
            "max_steps": 2,
            "group_size": 4,
            "per_device_batch": 8,
            "kl_beta": 0.04,
            "reward": {"length_mean_words": 6, "length_sd_words": 4, "bonus_from_words": 4, "bonus_to_words": 9},
        },
    )
    facts = run_step(
        "grpo",
        config=settings,
        inputs={"samples": data["samples"], "sft_model": base},
        outputs={"model": tmp_path / "model"},
        work=tmp_path / "work",
    )
    assert facts["history"][0]["kl"] == pytest.approx(0, abs=1e-6)
    assert facts["weight_change"] > 0


def test_layers_that_do_not_exist_are_named(base: Path) -> None:
    from avrt_lib.training import student as students

    settings = config(base, {"target_modules": ["no_such_proj"]})
    with pytest.raises(ConfigError, match="no_such_proj"):
        students.load(base, settings.student)
