"""An exported student's chat template: a plain question gets the trained instruction, everything else stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from avrt_lib import prompts
from avrt_lib.config import StudentConfig
from avrt_lib.training import student
from avrt_lib.training.chat_template import with_instruction
from avrt_lib.training.export import export
from tests.tiny_models import save_student

INSTRUCTION = prompts.instruction("reason")
OPTIONS = ["a bell", "a dog"]
TRAINED = prompts.question_prompt("student", "reason", "What is heard?", OPTIONS)
PLAIN = f"What is heard?\n{prompts.lettered(OPTIONS)}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def exported(base: Path) -> Path:
    learner = student.load(base, StudentConfig(model=str(base)), dtype=torch.float32)
    (base / "chat_template.json").write_text("{}")  # as older folders have it
    target = base.parent / "exported"
    export(learner, target, dtype=torch.float32, instruction=INSTRUCTION, made_by={})
    return target


def turn(text: str, *, parts: bool = True, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [{"type": "video"}, {"type": "text", "text": text}] if parts else text}


def rendered(folder: Path, *turns: dict[str, Any]) -> str:
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder)
    text: str = processor.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False)
    return text


def test_what_training_sends_stays_as_it_is(base: Path, exported: Path) -> None:
    (base / "chat_template.json").unlink(missing_ok=True)
    for asked in (turn(TRAINED), turn(TRAINED, parts=False)):
        assert rendered(exported, asked) == rendered(base, asked)


def test_a_plain_question_gets_the_instruction(base: Path, exported: Path) -> None:
    (base / "chat_template.json").unlink(missing_ok=True)
    for parts in (True, False):
        asked, full = turn(PLAIN, parts=parts), turn(f"{PLAIN}\n{INSTRUCTION}", parts=parts)
        assert rendered(exported, asked) == rendered(base, full)
    said = rendered(exported, turn("s", parts=False, role="system"), turn("q"), turn("a", role="assistant"), turn("r"))
    assert said.count(INSTRUCTION) == 2


def test_the_older_form_of_the_template_is_left_out(exported: Path) -> None:
    assert not (exported / "chat_template.json").exists()


def test_a_template_is_changed_once() -> None:
    once = with_instruction("{{ messages }}", 'Say "so", \\ and <think>.')
    assert with_instruction(once, 'Say "so", \\ and <think>.') == once
    assert with_instruction("{{ messages }}", "") == "{{ messages }}"


def test_prompts_with_an_instruction_and_without() -> None:
    assert INSTRUCTION.startswith("Watch and listen")
    assert prompts.instruction("plain") == ""
