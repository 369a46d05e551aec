"""The tiny models: one is rebuilt at a small budget and learns; the shipped student perceives but does not reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from avrt_lib.models import WEIGHTS, verify_manifest

torch = pytest.importorskip("torch")

from avrt_lib.miniature import families, learning, tasks, train  # noqa: E402


def test_the_shipped_weights_are_what_their_manifests_say_and_small() -> None:
    total = 0
    for name in train.TRAINERS:
        verify_manifest(WEIGHTS / name)
        total += sum(p.stat().st_size for p in (WEIGHTS / name).rglob("*") if p.is_file())
    assert total <= 10_000_000
    assert {p.suffix for p in WEIGHTS.rglob("*") if p.is_file()} <= {".safetensors", ".json", ".jinja"}


def test_a_rebuilt_audio_teacher_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clips = train.load_clips(tmp_path / "train", seed=1, count=96, prefix="t")
    held_out = train.load_clips(tmp_path / "held", seed=2, count=32, prefix="h")
    model, processor = families.build_audio_teacher(window_s=train.SHORT_WINDOW_S)
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    task = tasks.AudioTeacherTask(processor, clips)
    task.recipe = learning.Recipe(goal=2.0, cap=60, decay=20, max_new=88, batch=16, every=60)
    unseen = tasks.AudioTeacherTask(processor, held_out).validation(32)
    before = task.judge(unseen, learning.generate(model, task.tokenizer, task, unseen))
    learning.train(model, task.tokenizer, task, unseen, seed=0)
    after = task.judge(unseen, learning.generate(model, task.tokenizer, task, unseen))
    # Chance is a quarter: the sounds are told apart on clips that were never heard, and traces get the asked form.
    assert before["perceived"] <= 0.1
    assert after["perceived"] >= 0.7
    assert after["letters"] > before["letters"]


def test_the_base_student_perceives_and_answers_in_form_but_does_not_reason(tmp_path: Path) -> None:
    from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

    folder = WEIGHTS / "student"
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    task = tasks.StudentTask(
        AutoProcessor.from_pretrained(folder), train.load_clips(tmp_path, seed=11, count=48, prefix="x")
    )
    examples = task.validation(160, "shipped")
    scores = task.judge(examples, learning.generate(model, task.tokenizer, task, examples))
    assert scores["describe"] >= 0.95
    assert scores["answer"] >= 0.90
    assert scores["right"] <= 0.6
