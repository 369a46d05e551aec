"""A clip's sound features: those of the processor's whole window, computed of the clip's own length."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from avrt_lib.miniature import families  # noqa: E402
from avrt_lib.training.encoding import Encoder, decode_audio  # noqa: E402
from avrt_lib.training.student import Student  # noqa: E402
from tests import tiny_models  # noqa: E402


@pytest.mark.parametrize("window_s", [2, 300])
@pytest.mark.parametrize("seconds", [0.5, 1.0, 1.99, 3.0])
def test_they_are_the_same_bits(window_s: int, seconds: float) -> None:
    from transformers import WhisperFeatureExtractor

    model, processor = families.build_student()
    processor.feature_extractor = WhisperFeatureExtractor(
        feature_size=families.MEL_BINS, chunk_length=window_s, return_attention_mask=True
    )
    sample = tiny_models.sample(0, frames=0, seconds=seconds)
    text = processor.audio_bos_token + processor.audio_token + processor.audio_eos_token
    whole = processor(text=[text], audio=[decode_audio(sample)], return_tensors="pt")
    length = int(whole["feature_attention_mask"].sum())
    assert length == min(round(seconds * 100), window_s * 100)

    config = tiny_models.config("unused").student
    prompt = Encoder(Student(model, processor, Path(), ()), config).encode(sample)
    assert torch.equal(prompt["input_features"], whole["input_features"][:, :, :length])
    count = int((whole["input_ids"] == model.config.audio_token_id).sum())
    assert int((prompt["input_ids"] == model.config.audio_token_id).sum()) == count > 0
