"""Preparing models on tiny random ones in the published layouts: adapters merged, pickles converted, code pinned."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from avrt_lib.errors import ConfigError, DataError
from avrt_lib.hub.importing import import_folder
from avrt_lib.hub.prepare import merge_adapter, prepare
from avrt_lib.models import resolve, verify_manifest
from avrt_lib.tables import read_json

torch = pytest.importorskip("torch")

from tests import hub_layouts  # noqa: E402


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A tiny Audio Flamingo 3 with its think adapter, and what the merged tensors should be."""
    folder = hub_layouts.save_flamingo(tmp_path_factory.mktemp("hub") / "audio-flamingo-3-hf")
    return folder, hub_layouts.add_think(folder)


@pytest.fixture(scope="module")
def prepared(published: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = prepare(
        published[0],
        str(tmp_path_factory.mktemp("models")),
        name="nvidia/audio-flamingo-3-hf",
        revision=hub_layouts.COMMIT,
        adapter="think",
    )
    return Path(made.address)


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def copy_of(published: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(published[0], tmp_path / "copy"))


def test_the_adapter_is_merged_into_the_layers_that_it_changes(
    published: tuple[Path, dict[str, Any]], prepared: Path
) -> None:
    after = tensors(prepared)
    assert all(torch.allclose(after[name], wanted, atol=1e-6) for name, wanted in published[1].items())


def test_all_other_tensors_stay_as_they_were(published: tuple[Path, dict[str, Any]], prepared: Path) -> None:
    before, after = tensors(published[0]), tensors(prepared)
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before if name not in published[1])


def test_nothing_that_could_be_a_pickle_is_published(prepared: Path) -> None:
    assert not [path for path in prepared.rglob("*") if path.suffix in (".bin", ".pt")]


def test_the_manifest_says_what_it_was_made_of(prepared: Path) -> None:
    made_by = verify_manifest(prepared)["made_by"]
    assert made_by["model"] == "nvidia/audio-flamingo-3-hf/think"
    assert made_by["revision"] == hub_layouts.COMMIT
    assert made_by["merged"]["lora"] == 4


def test_transformers_writes_with_the_merged_model_as_with_the_adapter_beside_it(
    published: tuple[Path, dict[str, Any]], prepared: Path
) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from safetensors.torch import load_file
    from transformers import AudioFlamingo3ForConditionalGeneration as Flamingo

    beside = Flamingo.from_pretrained(published[0])
    inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]), beside.model.language_model
    )
    # transformers names the language model's layers otherwise than the published files do.
    factors = {
        name.removeprefix("base_model.model.language_model.model.").replace(".weight", ".default.weight"): value
        for name, value in load_file(published[0] / "think" / "adapter_model.safetensors").items()
    }
    assert not beside.model.language_model.load_state_dict(factors, strict=False).unexpected_keys
    others = torch.load(published[0] / "think" / "non_lora_trainables.bin", weights_only=True)
    beside.model.load_state_dict({k.removeprefix("base_model.model."): v for k, v in others.items()}, strict=False)
    merged = Flamingo.from_pretrained(prepared)
    inputs = flamingo_inputs(prepared)
    with torch.no_grad():
        assert torch.allclose(beside(**inputs).logits, merged(**inputs).logits, atol=1e-4)


def flamingo_inputs(folder: Path) -> Any:
    import numpy as np
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    wave = np.sin(np.arange(16_000) / 20).astype("float32")
    return processor(text="<sound> what is it?", audio=wave)


@pytest.mark.slow
def test_vllm_serves_the_prepared_model(prepared: Path) -> None:
    pytest.importorskip("vllm")
    import numpy as np

    from avrt_lib.config import EngineConfig
    from avrt_lib.engine import factory
    from avrt_lib.engine.base import ChatRequest
    from avrt_lib.engine.messages import audio_part, chat
    from tests.tiny_models import flac

    engine = EngineConfig(model=str(prepared), dtype="float32", max_model_len=1024, max_tokens=4, kv_cache_gib=0.2)
    part = audio_part(flac(np.sin(np.arange(16_000) / 20)))
    with factory.build(engine, limits={"audio": 1}) as built:
        (answer,) = built.chat([ChatRequest("a", chat("what is it?", [part]), 4)])
    assert answer.error is None
    assert answer.tokens_out > 0


def test_an_adapter_with_transformers_newer_names_is_merged_alike(
    published: tuple[Path, dict[str, Any]], prepared: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(published, tmp_path)
    file = folder / "think" / "adapter_model.safetensors"
    newer = {k.replace("language_model.model", "model.language_model"): v for k, v in load_file(file).items()}
    save_file(newer, file)
    made = prepare(folder, str(tmp_path / "models"), name="a/b", revision=None, adapter="think")
    after, wanted = tensors(Path(made.address)), tensors(prepared)
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)


def test_an_adapter_of_another_layout_is_refused(published: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(published, tmp_path)
    file = folder / "think" / "adapter_model.safetensors"
    save_file({name.replace("language_model.model", "llm"): v for name, v in load_file(file).items()}, file)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"belongs to another model"):
        merge_adapter(folder, folder / "think", tmp_path / "out")


def test_an_adapter_of_an_unsupported_kind_is_refused(published: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = copy_of(published, tmp_path)
    settings = folder / "think" / "adapter_config.json"
    settings.write_text(json.dumps({**read_json(settings), "use_dora": True}))
    with pytest.raises(ConfigError, match="use_dora"):
        prepare(folder, str(tmp_path / "models"), name=None, revision=None, adapter="think")


def test_the_command_prints_the_address_and_writes_the_lock(
    published: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from avrt_lib.cli.models import app

    lock = tmp_path / "models.lock"
    options = ["--adapter", "think", "--name", "nvidia/audio-flamingo-3-hf", "--revision", hub_layouts.COMMIT]
    command = ["prepare", str(published[0]), "--to", str(tmp_path / "models"), "--lock", str(lock), *options]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    entry = read_json(lock)["nvidia/audio-flamingo-3-hf/think"]
    assert entry["revision"] == hub_layouts.COMMIT
    assert entry["model"] in done.output


def test_the_command_to_import_without_a_commit_writes_no_lock(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from avrt_lib.cli.models import app

    folder, lock = hub_layouts.save_qwen(tmp_path / "qwen"), tmp_path / "models.lock"
    command = ["import", str(folder), "--to", str(tmp_path / "models"), "--lock", str(lock)]
    CliRunner().invoke(app, command, catch_exceptions=False)
    assert list((tmp_path / "models" / "qwen").iterdir())
    assert not lock.exists()


class Runs:
    """Unpickling an object of this class runs a command."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(
    published: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = copy_of(published, tmp_path)
    (folder / "think" / "non_lora_trainables.bin").write_bytes(pickle.dumps({"w": Runs(tmp_path / "proof")}))
    with pytest.raises(DataError, match="more than tensors"):
        prepare(folder, str(tmp_path / "models"), name=None, revision=None, adapter="think")
    assert not (tmp_path / "proof").exists()


def test_pickled_weights_become_safetensors(tmp_path: Path) -> None:
    folder = hub_layouts.save_qwen(tmp_path / "qwen")
    before = tensors(folder)
    (folder / "model.safetensors").unlink()
    torch.save(before, folder / "pytorch_model.bin")
    made = prepare(folder, str(tmp_path / "models"), name=None, revision=None, adapter=None)
    after = tensors(resolve(made.address))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_models_own_code_is_written_down_with_everything_it_imports(tmp_path: Path) -> None:
    folder = hub_layouts.save_with_code(tmp_path / "kimi")
    made = prepare(
        folder,
        str(tmp_path / "models"),
        name="moonshotai/Kimi-VL-A3B-Thinking",
        revision=hub_layouts.COMMIT,
        adapter=None,
    )
    code = read_json(Path(made.address) / "manifest.json")["made_by"]["code"]
    assert set(code) == {"processing_tiny.py", "image_processing_tiny.py"}


def test_a_models_own_code_needs_its_commit(tmp_path: Path) -> None:
    folder = hub_layouts.save_with_code(tmp_path / "kimi")
    with pytest.raises(ConfigError, match="--revision"):
        prepare(folder, str(tmp_path / "models"), name=None, revision=None, adapter=None)


def test_code_of_another_repository_is_refused(tmp_path: Path) -> None:
    folder = hub_layouts.save_with_code(tmp_path / "kimi", processing="other/repo--processing_tiny.TinyProcessor")
    with pytest.raises(ConfigError, match="another repository"):
        import_folder(folder, str(tmp_path / "models"))


def test_code_that_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = hub_layouts.save_with_code(tmp_path / "kimi")
    (folder / "image_processing_tiny.py").unlink()
    with pytest.raises(ConfigError, match=r"image_processing_tiny\.py"):
        import_folder(folder, str(tmp_path / "models"))


def test_importing_keeps_a_folder_and_publishes_the_same_bytes(tmp_path: Path) -> None:
    folder = hub_layouts.save_qwen(tmp_path / "qwen")
    published = import_folder(folder, str(tmp_path / "models"), name="Qwen/Tiny", revision=hub_layouts.COMMIT)
    assert Path(published.address).parent == tmp_path / "models" / "tiny"
    assert (folder / "model.safetensors").read_bytes() == (
        resolve(published.address) / "model.safetensors"
    ).read_bytes()


def test_what_a_killed_preparation_left_is_gone_with_the_next(tmp_path: Path) -> None:
    folder, to = hub_layouts.save_qwen(tmp_path / "qwen"), tmp_path / "models"
    for left in (".qwen-prepared.x1.tmp", "qwen-prepared"):
        (to / ".incoming" / left).mkdir(parents=True)
    prepare(folder, str(to), name=None, revision=None, adapter=None)
    assert [path.name for path in (to / ".incoming").iterdir()] == [".qwen-prepared.lock"]


def test_importing_again_finds_the_same_place(tmp_path: Path) -> None:
    folder = hub_layouts.save_qwen(tmp_path / "qwen")
    first = import_folder(folder, str(tmp_path / "models"))
    assert import_folder(Path(first.address), str(tmp_path / "models"), name="qwen") == first


def test_the_folder_that_one_stands_in_gives_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub_layouts.save_qwen(tmp_path / "qwen"))
    published = import_folder(Path(), str(tmp_path / "models"))
    assert (published.name, Path(published.address).parent) == ("qwen", tmp_path / "models" / "qwen")


def test_a_name_without_a_letter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--name"):
        import_folder(hub_layouts.save_qwen(tmp_path / "qwen"), str(tmp_path / "models"), name="…")


def test_a_model_is_not_published_into_its_own_folder(tmp_path: Path) -> None:
    folder = hub_layouts.save_qwen(tmp_path / "qwen")
    with pytest.raises(ConfigError, match="outside of it"):
        import_folder(folder, str(folder / "models"))
    with pytest.raises(ConfigError, match="outside of it"):
        prepare(folder, str(folder), name=None, revision=None, adapter=None)


def test_importing_refuses_a_pickle_and_says_the_mend(tmp_path: Path) -> None:
    folder = hub_layouts.save_qwen(tmp_path / "qwen")
    (folder / "extra.pt").write_bytes(b"x")
    with pytest.raises(DataError, match="avrt models prepare"):
        import_folder(folder, str(tmp_path / "models"))


def test_importing_refuses_a_file_that_was_cut_short(tmp_path: Path) -> None:
    folder = hub_layouts.save_qwen(tmp_path / "qwen")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="cut short"):
        import_folder(folder, str(tmp_path / "models"))


def test_importing_refuses_a_file_that_differs_from_the_senders_sums(tmp_path: Path) -> None:
    folder = hub_layouts.save_qwen(tmp_path / "qwen")
    (folder / "SHA256SUMS").write_text(f"{'0' * 64}  ./config.json\n")
    with pytest.raises(DataError, match="SHA256SUMS"):
        import_folder(folder, str(tmp_path / "models"))


def test_importing_refuses_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    folder = hub_layouts.save_qwen(tmp_path / "qwen")
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="lm_head"):
        import_folder(folder, str(tmp_path / "models"))
