"""The student as a trainable model: loading, freezing, and the hidden-state view that TRL's fused LM head needs.

The student is the thinker of Qwen2.5-Omni. Its folder has the full Omni layout, the only one that vLLM serves
(``model_type`` ``qwen2_5_omni``, ``thinker_config``, weights under ``thinker.``); transformers' thinker class loads it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration
from transformers.utils import logging as transformers_logging

from avrt_lib.config import LoraConfig, StudentConfig
from avrt_lib.errors import ConfigError, TrainingError
from avrt_lib.tables import read_json

if TYPE_CHECKING:
    from transformers import ProcessorMixin

MEDIA_TOKENS = ("image_token", "audio_token", "video_token")
MEDIA_BOUNDARIES = (
    "vision_bos_token",
    "vision_eos_token",
    "audio_bos_token",
    "audio_eos_token",
)


#: The thinker's language model, which adapters are put into; its encoders have layers of the same names.
LANGUAGE_MODEL = "model"
ADAPTER_MARK = ".lora_"


class _HiddenStates:
    """The thinker without its LM head, callable as TRL calls a backbone.

    It is not a module and holds none, so that parameters are neither registered nor saved twice. The three encoder
    entry points are what transformers' generation asks of a ``base_model``.
    """

    _tp_plan: dict[str, str] | None = None
    _pp_plan: dict[str, Any] | None = None

    def __init__(self, thinker: Thinker) -> None:
        self._thinker = thinker
        self.get_image_features = thinker.get_image_features
        self.get_video_features = thinker.get_video_features
        self.get_audio_features = thinker.get_audio_features

    def __call__(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        thinker = self._thinker
        with _headless(thinker):
            output = type(thinker).forward(thinker, *args, **kwargs)
        return SimpleNamespace(last_hidden_state=output.logits)


@contextmanager
def _headless(thinker: Thinker) -> Iterator[None]:
    head = thinker._modules["lm_head"]
    thinker._modules["lm_head"] = nn.Identity()
    try:
        yield
    finally:
        thinker._modules["lm_head"] = head


class Thinker(Qwen2_5OmniThinkerForConditionalGeneration):
    """transformers' thinker, with a ``base_model`` that returns hidden states.

    TRL (1.x) computes per-token log-probabilities from ``model.base_model(...).last_hidden_state``. The thinker's
    ``base_model_prefix`` is ``thinker``, an attribute that only the full Omni model has, so its ``base_model`` would be
    the model itself, whose output has logits and no hidden states. This class mends that; nothing else changes.
    """

    @property
    def base_model(self) -> Any:
        """The model up to its last hidden states of shape (batch, length, hidden)."""
        return _HiddenStates(self)

    def enable_input_require_grads(self) -> None:
        """Let gradients flow from the language model's embeddings, which checkpointing of activations asks for.

        transformers asks it of each submodel's embeddings, so that the backward pass would run through the encoders
        although they are frozen. Encoders that are trained need no hook: their own parameters ask for gradients.
        """
        hook = self.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
        self._require_grads_hooks = [hook]

    def save_pretrained(
        self, save_directory: Any, *args: Any, state_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Save as transformers does; with adapters their weights alone, which is all that a checkpoint needs."""
        state = state_dict or self.state_dict()
        adapters = {name: value for name, value in state.items() if ADAPTER_MARK in name}
        super().save_pretrained(save_directory, *args, state_dict=adapters or state_dict, **kwargs)


@dataclass(frozen=True)
class Student:
    """A loaded student.

    Attributes:
        model: the thinker, with the modules of ``student.freeze`` frozen.
        processor: tokenizer, feature extractor, video processor and chat template of the same folder.
        folder: where it was loaded from.
        freeze: names of the frozen modules.
    """

    model: Thinker
    processor: ProcessorMixin
    folder: Path
    freeze: tuple[str, ...]

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def media_token_ids(self) -> list[int]:
        """Ids of the tokens that stand for media or frame them; a completion must never hold one."""
        names = [getattr(self.processor, name, None) for name in MEDIA_TOKENS + MEDIA_BOUNDARIES]
        ids = {self.tokenizer.convert_tokens_to_ids(name) for name in names if name}
        return sorted(i for i in ids if i is not None and i != self.tokenizer.unk_token_id)

    def frozen(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values of the frozen parameters, in the model's order."""
        for name, parameter in self.model.named_parameters():
            if name.split(".")[0] in self.freeze:
                yield name, parameter


def load(folder: Path, config: StudentConfig, *, dtype: torch.dtype | None = None, adapters: bool = True) -> Student:
    """Load a student from a folder in the full Omni layout, freeze its encoders, and add the adapters it learns in.

    Args:
        folder: a local model folder.
        config: the student's section.
        dtype: of the parameters; None takes float32, which an optimiser without master weights needs (at the paper's
            learning rate of 2e-6 most updates vanish in bfloat16). With ``student.lora`` it is ``student.dtype``, since
            only the adapters, which are float32, are trained.
        adapters: False leaves out what ``student.lora`` asks for: the model is only read.

    Raises:
        ConfigError: where the folder is not a Qwen2.5-Omni model, or a module to freeze or to adapt does not exist.
    """
    document = read_json(folder / "config.json")
    if document.get("model_type") != "qwen2_5_omni":
        raise ConfigError(
            f"{folder} is a {document.get('model_type')!r} model: student.model must be a qwen2_5_omni folder in its "
            "full layout (with thinker_config)."
        )
    transformers_logging.disable_progress_bar()
    # The talker's default configuration names tokens of a vocabulary that a small thinker does not have.
    transformers_logging.set_verbosity_error()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    if dtype is None:
        dtype = torch.bfloat16 if config.lora is not None and config.dtype == "bfloat16" else torch.float32
    model = Thinker.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    tokenizer = processor.tokenizer
    if getattr(model.config, "vision_start_token_id", None) is None:
        # get_rope_index finds the pictures by this id and takes every one for text without it.
        model.config.vision_start_token_id = tokenizer.convert_tokens_to_ids(processor.vision_bos_token)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = end_token_ids(model, tokenizer)
    modules = dict(model.named_children())
    for name in config.freeze:
        if name not in modules:
            raise ConfigError(f"student.freeze: the model has no module {name!r}; it has {', '.join(sorted(modules))}.")
        modules[name].requires_grad_(False)
    if config.lora is not None and adapters:
        add_adapters(model, config.lora)
    return Student(model, processor, folder, tuple(config.freeze))


def add_adapters(model: Thinker, lora: LoraConfig) -> None:
    """Put LoRA layers into the language model, in place, and train nothing else.

    They are put into the model rather than the model into PEFT's, so that trainers, generation and export see the same
    class with and without them.

    Raises:
        ConfigError: where the language model has no such layers.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import inject_adapter_in_model

    names = "|".join(map(re.escape, lora.target_modules))
    peft_config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=rf"{LANGUAGE_MODEL}\..*\.({names})",
    )
    try:
        inject_adapter_in_model(peft_config, model)
    except ValueError as error:
        raise ConfigError(
            f"student.lora.target_modules: the language model has no layers {', '.join(lora.target_modules)}."
        ) from error
    for name, parameter in model.named_parameters():
        if ADAPTER_MARK in name:
            parameter.data = parameter.data.float()


def merged_state(model: Thinker) -> dict[str, torch.Tensor]:
    """The model's state without adapters: what they add is added to the weights that they stand beside."""
    from peft.tuners.lora import LoraLayer

    state = {
        name.replace(".base_layer.", "."): value
        for name, value in model.state_dict().items()
        if ADAPTER_MARK not in name
    }
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            added = module.get_delta_weight("default")
            state[f"{path}.weight"] = (state[f"{path}.weight"].float() + added.float()).cpu()
    return state


def end_token_ids(model: Thinker, tokenizer: Any) -> list[int]:
    """Every token id that ends a completion: the tokenizer's own first, then the generation configuration's."""
    declared = model.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(declared if isinstance(declared, list | tuple) else [declared])]
    return list(dict.fromkeys(i for i in ids if i is not None))


def frozen_sha256(student: Student) -> str:
    """SHA-256 over names, types, shapes and bytes of the frozen parameters."""
    digest = hashlib.sha256()
    for name, parameter in student.frozen():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\0".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_frozen(student: Student, before: str) -> None:
    """Compare the frozen parameters with what they hashed to before.

    Raises:
        TrainingError: where they differ.
    """
    if frozen_sha256(student) != before:
        raise TrainingError(
            f"Parameters of {', '.join(student.freeze)} changed although they are frozen: the result is not kept."
        )


def set_threads(threads: int | None) -> None:
    """Use this many CPU threads in this process; None leaves torch's own choice (all cores, or OMP_NUM_THREADS)."""
    if threads is not None:
        torch.set_num_threads(threads)
