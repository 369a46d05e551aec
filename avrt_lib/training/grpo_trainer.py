"""TRL's GRPO trainer with video and sound in generation and in the log-probability forwards.

TRL 1.16 carries images only. With sound or video in the prompt it generates with them, but computes log-probabilities,
the policy's as well as the reference's, from the text alone, without saying so: the gradients are wrong. Four
overrides carry the media as one column of per-sample dictionaries, which TRL's own shuffling and splitting of the
generation batch keep beside their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from trl import GRPOTrainer
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import add_fused_lm_head

from avrt_lib.errors import TrainingError
from avrt_lib.training.encoding import AUDIO_KEYS, VIDEO_KEYS, collate_media

Prompt = Mapping[str, torch.Tensor]


class AudioVisualGrpoTrainer(GRPOTrainer):
    """GRPO on prompts with any mix of media.

    Rows of the training set need ``prompt`` (unused but for TRL's own logs) and ``row``.

    Args:
        encode: prompt tensors of a row at a step (see ``Encoder.encode``); the same for all completions of a group.
        reference: the frozen reference policy for ``args.beta`` > 0, whose log-probabilities the KL term compares. It
            is given, since TRL would build one from the model's name, and the full Omni layout names a class that also
            holds the talker.
        keywords: of TRL's trainer.
    """

    def __init__(
        self, *, encode: Callable[[int, int], Prompt], reference: torch.nn.Module | None, **keywords: Any
    ) -> None:
        self._encode = encode
        self._prompts: Sequence[Prompt] = []
        arguments = keywords["args"]
        beta, arguments.beta = arguments.beta, 0.0
        super().__init__(**keywords)
        arguments.beta = beta
        if beta > 0 and reference is not None:
            self.beta = beta
            self.ref_model = self._prepare_reference(reference)

    def _prepare_reference(self, reference: torch.nn.Module) -> Any:
        reference.requires_grad_(False)
        reference.eval()
        add_fused_lm_head(reference, temperature=self.temperature)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._prompts = [self._encode(row["row"], self.state.global_step) for row in inputs]
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        output["media"] = list(self._prompts)
        return output

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, torch.Tensor]]:
        return [prompt["input_ids"].tolist() for prompt in self._prompts], None, collate_media(self._prompts)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self._prompts = inputs["media"]
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Log-probabilities (and entropies) of the completions, of shape (batch, ``logits_to_keep``)."""
        rows = input_ids.size(0)
        if len(self._prompts) != rows:
            raise TrainingError(
                f"{len(self._prompts)} prompts stand beside {rows} completions: media would be mixed up."
            )
        size = batch_size or rows
        log_probs, entropies = [], []
        for start in range(0, rows, size):
            chunk = slice(start, start + size)
            ids, mask = input_ids[chunk], attention_mask[chunk]
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, :-logits_to_keep] = -100
            media = {k: v.to(ids.device) for k, v in collate_media(self._prompts[chunk]).items()}
            self._check_media(ids, media)
            with self.accelerator.autocast():
                output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, **media)
            log_probs.append(output.log_probs[:, -logits_to_keep:])
            if compute_entropy:
                entropies.append(output.entropy[:, -logits_to_keep:])
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None

    def _check_media(self, ids: torch.Tensor, media: Mapping[str, torch.Tensor]) -> None:
        """Refuse a forward whose placeholders have no features, which would learn from text alone."""
        config = self.accelerator.unwrap_model(self.model).config
        for token, key in ((config.video_token_id, VIDEO_KEYS[0]), (config.audio_token_id, AUDIO_KEYS[0])):
            if bool((ids == token).any()) != (key in media):
                raise TrainingError(f"The prompts of a batch and its {key} do not belong together.")
