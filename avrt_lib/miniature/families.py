"""The four tiny models: production families' architectures and processors at about one million parameters.

=============== ============================================ ==========================
built-in name   architecture                                 stands where production has
=============== ============================================ ==========================
vision_teacher  Qwen2.5-VL                                   Kimi-VL-A3B-Thinking
audio_teacher   Qwen2-Audio                                  Audio Flamingo 3 (think)
merger          Qwen3                                        Qwen2.5-14B-Instruct
student         Qwen2.5-Omni (thinker)                       Qwen2.5-Omni-3B / 7B
=============== ============================================ ==========================
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from avrt_lib.compat import apply as apply_compat

apply_compat()

import torch  # noqa: E402
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Tokenizer,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

from avrt_lib.miniature.texts import TAGS, corpus  # noqa: E402

VOCABULARY = 448
CONTEXT = 4096
FRAME_PX = 28
MEL_BINS = 128
STUDENT_WINDOW_S = 2
#: Qwen2-Audio's encoder accepts no other window than Whisper's 30 seconds.
TEACHER_WINDOW_S = 30

_PAD, _START, _END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_OMNI = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
_VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_AUDIO = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]


@dataclass(frozen=True, slots=True)
class Size:
    """Widths and depths of a tiny model; small initialisation ranges learn far slower at this size."""

    hidden: int = 128
    layers: int = 3
    heads: int = 4
    intermediate: int = 352
    encoder_hidden: int = 64
    encoder_layers: int = 2
    rope_theta: float = 1e4
    initializer_range: float = 0.08

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def mrope_section(self) -> list[int]:
        """How the rotary dimensions are shared by time, height and width; sums to half a head."""
        part = self.head_dim * 3 // 16
        return [self.head_dim // 2 - 2 * part, part, part]


def _template(image: str, audio: str, video: str) -> str:
    """A chat template in the Qwen form, with the family's own media placeholders."""
    return (
        "{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] in ('image', 'image_url') %}"
        + image
        + "{% elif part['type'] in ('video', 'video_url') %}"
        + video
        + "{% elif part['type'] in ('audio', 'input_audio', 'audio_url') %}"
        + audio
        + "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


_VL_TEMPLATE = _template(
    "<|vision_start|><|image_pad|><|vision_end|>", "", "<|vision_start|><|video_pad|><|vision_end|>"
)
_AUDIO_TEMPLATE = _template("", "<|audio_bos|><|AUDIO|><|audio_eos|>", "")
_OMNI_TEMPLATE = _template(
    "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "<|audio_bos|><|AUDIO|><|audio_eos|>",
    "<|vision_bos|><|VIDEO|><|vision_eos|>",
)


def build_tokenizer(media_tokens: list[str], template: str, named: dict[str, str] | None = None) -> Qwen2Tokenizer:
    """A byte-level BPE with Qwen2's pre-tokenisation, trained on the world's own texts."""
    specials = [_PAD, _START, _END, *media_tokens]
    trainer = Tokenizer(models.BPE())
    trainer.normalizer = normalizers.NFC()
    trainer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer.decoder = decoders.ByteLevel()
    # The tags become tokens of their own afterwards; they must not shape the merges.
    tags = re.compile("|".join(map(re.escape, TAGS)))
    trainer.train_from_iterator(
        (piece for text in corpus() for piece in tags.split(text)),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(specials) - len(TAGS),
            min_frequency=2,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    learned = json.loads(trainer.to_str())["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in learned["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=merges,
        unk_token=None,
        eos_token=_END,
        pad_token=_PAD,
        model_max_length=CONTEXT,
        padding_side="left",
        extra_special_tokens=specials,
        **(named or {}),
    )
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer.chat_template = template
    return tokenizer


def _language_model(tokenizer: Qwen2Tokenizer, size: Size, **extra: Any) -> dict[str, Any]:
    ids = tokenizer.convert_tokens_to_ids
    return {
        "vocab_size": (len(tokenizer) + 63) // 64 * 64,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": max(1, size.heads // 2),
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": size.rope_theta},
        "initializer_range": size.initializer_range,
        "tie_word_embeddings": True,
        "bos_token_id": ids(_PAD),
        "eos_token_id": ids(_END),
        "pad_token_id": ids(_PAD),
        **extra,
    }


def _set_generation(model: PreTrainedModel, tokenizer: Qwen2Tokenizer) -> None:
    ids = tokenizer.convert_tokens_to_ids
    model.generation_config.eos_token_id = [ids(_END), ids(_PAD)]
    model.generation_config.pad_token_id = ids(_PAD)
    model.generation_config.bos_token_id = None


def _pixels(frame_px: int) -> dict[str, int]:
    return {"shortest_edge": 28 * 28, "longest_edge": frame_px * frame_px}


def build_vision_teacher(size: Size = Size()) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A Qwen2.5-VL of random weights and its processor; one 28 px frame becomes one token."""
    tokenizer = build_tokenizer(_VISION, _VL_TEMPLATE)
    ids = tokenizer.convert_tokens_to_ids
    text = _language_model(tokenizer, size)
    text["rope_parameters"]["mrope_section"] = size.mrope_section
    config = Qwen2_5_VLConfig(
        text_config=text,
        tie_word_embeddings=True,
        vision_config={
            "depth": size.encoder_layers,
            "hidden_size": size.encoder_hidden,
            "intermediate_size": 2 * size.encoder_hidden,
            "num_heads": size.encoder_hidden // 32,
            "out_hidden_size": size.hidden,
            "fullatt_block_indexes": [size.encoder_layers - 1],
            "window_size": 112,
            "patch_size": 14,
            "initializer_range": size.initializer_range,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    _set_generation(model, tokenizer)
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessorPil(size=_pixels(FRAME_PX)),
        video_processor=Qwen2VLVideoProcessor(size=_pixels(FRAME_PX)),
        tokenizer=tokenizer,
        chat_template=_VL_TEMPLATE,
    )
    return model, processor


def build_audio_teacher(
    size: Size = Size(), window_s: int = TEACHER_WINDOW_S
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A Qwen2-Audio of random weights and its processor.

    Args:
        size: of the language model and the encoder.
        window_s: the encoder's window. Only 30 s can be served; training uses a shorter one, since the encoder always
            runs over its whole window.
    """
    tokenizer = build_tokenizer(_AUDIO, _AUDIO_TEMPLATE)
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "d_model": size.encoder_hidden,
            "encoder_layers": size.encoder_layers,
            "encoder_attention_heads": size.encoder_hidden // 32,
            "encoder_ffn_dim": 2 * size.encoder_hidden,
            "num_mel_bins": MEL_BINS,
            "max_source_positions": 50 * window_s,
            "initializer_range": size.initializer_range,
        },
        # This class declares no tied weights, so the checkpoint holds both copies.
        text_config={"model_type": "qwen2", **_language_model(tokenizer, size, tie_word_embeddings=False)},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        initializer_range=size.initializer_range,
    )
    model = Qwen2AudioForConditionalGeneration(config)
    _set_generation(model, tokenizer)
    extractor = WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=window_s)
    return model, Qwen2AudioProcessor(feature_extractor=extractor, tokenizer=tokenizer, chat_template=_AUDIO_TEMPLATE)


def build_merger(size: Size = Size()) -> tuple[PreTrainedModel, Qwen2Tokenizer]:
    """A Qwen3 of random weights and its tokenizer."""
    tokenizer = build_tokenizer([], _template("", "", ""))
    model = Qwen3ForCausalLM(Qwen3Config(head_dim=size.head_dim, **_language_model(tokenizer, size)))
    _set_generation(model, tokenizer)
    return model, tokenizer


def build_student(size: Size = Size()) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A Qwen2.5-Omni thinker of random weights and its processor; four 28 px frames become two tokens."""
    tokenizer = build_tokenizer(list(_OMNI.values()), _OMNI_TEMPLATE, _OMNI)
    ids = tokenizer.convert_tokens_to_ids
    text = _language_model(tokenizer, size)
    text["rope_parameters"]["mrope_section"] = size.mrope_section
    config = Qwen2_5OmniThinkerConfig(
        text_config=text,
        vision_config={
            "depth": size.encoder_layers,
            "hidden_size": size.encoder_hidden,
            "intermediate_size": 2 * size.encoder_hidden,
            "num_heads": size.encoder_hidden // 32,
            "out_hidden_size": size.hidden,
            "fullatt_block_indexes": [size.encoder_layers - 1],
            "window_size": 112,
            "patch_size": 14,
            "initializer_range": size.initializer_range,
        },
        audio_config={
            "num_mel_bins": MEL_BINS,
            "encoder_layers": size.encoder_layers,
            "encoder_attention_heads": size.encoder_hidden // 32,
            "encoder_ffn_dim": 2 * size.encoder_hidden,
            "d_model": size.encoder_hidden,
            "output_dim": size.hidden,
            "max_source_positions": 1500,
            "n_window": 100,
            "initializer_range": size.initializer_range,
        },
        tie_word_embeddings=True,
        initializer_range=size.initializer_range,
        audio_token_index=ids("<|AUDIO|>"),
        image_token_index=ids("<|IMAGE|>"),
        video_token_index=ids("<|VIDEO|>"),
        audio_start_token_id=ids("<|audio_bos|>"),
        audio_end_token_id=ids("<|audio_eos|>"),
        vision_start_token_id=ids("<|vision_bos|>"),
        vision_end_token_id=ids("<|vision_eos|>"),
        user_token_id=ids("user"),
        pad_token_id=ids(_PAD),
    )
    model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    _set_generation(model, tokenizer)
    processor = Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessorPil(size=_pixels(FRAME_PX)),
        video_processor=Qwen2VLVideoProcessor(size=_pixels(FRAME_PX)),
        feature_extractor=WhisperFeatureExtractor(
            feature_size=MEL_BINS, chunk_length=STUDENT_WINDOW_S, return_attention_mask=True
        ),
        tokenizer=tokenizer,
        chat_template=_OMNI_TEMPLATE,
    )
    return model, processor


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters of a model, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
