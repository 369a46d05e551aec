"""vLLM in this process: the fastest way to answer a batch, without HTTP."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from avrt_lib import compat, models
from avrt_lib.config import EngineConfig
from avrt_lib.engine.base import ChatRequest, Completion
from avrt_lib.errors import EngineError

log = logging.getLogger("avrt")

_GIB = 1 << 30
#: Loggers that warn once or twice with every request, of what is meant to be so.
_CHATTY = ("vllm.v1.worker.cpu_worker", "vllm.multimodal.media.audio")


class VllmEngine:
    """A model in vLLM's in-process engine.

    The same requests in one ``chat`` call give the same completions, whatever was asked before: prefixes are not cached
    and encoder outputs do not outlive a call, since both change the batches that the kernels see, and with them the
    last bits of the result. What the processor made of a clip is cached, as that is exact.

    Args:
        config: the model and how it is loaded.
        limits: media items per request, by modality; None for a text-only model.
        mm_kwargs: keyword arguments of the model's processor.
        media_io_kwargs: keyword arguments of vLLM's media loaders.
        name: what rows name as their model; the configuration's reference if not given.

    Raises:
        EngineError: where the model cannot be loaded; the message holds vLLM's reason.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        limits: Mapping[str, int] | None = None,
        mm_kwargs: Mapping[str, Any] | None = None,
        media_io_kwargs: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        compat.apply()
        environment = compat.vllm_environment(in_process=True)
        # kv_cache_memory_bytes says it in bytes; the variable would override it with whole GiB.
        environment.pop("VLLM_CPU_KVCACHE_SPACE")
        compat.set_defaults(environment)
        self._name = name or config.model
        folder = models.resolve(config.model)
        started = time.monotonic()
        try:
            from vllm import LLM
            from vllm.platforms import current_platform

            self.on_cpu = bool(current_platform.is_cpu())
            options: dict[str, Any] = {}
            if limits:
                options["limit_mm_per_prompt"] = dict(limits)
                # A sample's media come again at once (another condition, another attempt) or never; vLLM's own default
                # grows by 4 GiB in each engine.
                options["mm_processor_cache_gb"] = 0.125
            if mm_kwargs:
                options["mm_processor_kwargs"] = dict(mm_kwargs)
            if media_io_kwargs:
                options["media_io_kwargs"] = dict(media_io_kwargs)
            if self.on_cpu:
                # Compiling costs minutes on a CPU. A request with a seed kills the CPU engine with chunked prefill on.
                options |= {
                    "enforce_eager": True,
                    "enable_chunked_prefill": False,
                    "kv_cache_memory_bytes": int(config.kv_cache_gib * _GIB),
                    # Encoders run over a whole step's media at once: an audio window of 30 s costs tens of megabytes
                    # of attention for each request, so a larger step would not fit a small machine.
                    "max_num_batched_tokens": config.max_model_len,
                }
            self._llm: Any = LLM(
                model=str(folder),
                dtype=config.dtype,
                max_model_len=config.max_model_len,
                tensor_parallel_size=config.tensor_parallel_size,
                gpu_memory_utilization=config.gpu_memory_utilization,
                trust_remote_code=config.trust_remote_code,
                enable_prefix_caching=False,
                disable_log_stats=True,
                seed=0,
                **options,
            )
        except ImportError as error:
            raise EngineError(
                f"vLLM cannot be imported ({error}): install the extra 'vllm' of this package."
            ) from error
        except Exception as error:  # vLLM wraps failures of loading in many types
            raise EngineError(f"vLLM could not load {folder}: {_first_line(error)}") from error
        for chatty in _CHATTY:  # after loading, which configures vLLM's loggers anew
            logging.getLogger(chatty).setLevel(logging.ERROR)
        log.info("vLLM loaded %s in %.1f s", folder, time.monotonic() - started)

    @property
    def model(self) -> str:
        """What the rows that this engine makes name as their model."""
        return self._name

    def chat(self, requests: Sequence[ChatRequest]) -> list[Completion]:
        """Answer every request as one batch, in their order.

        A request that vLLM refuses (too long, broken media) comes back with ``error`` set. ``latency_s`` is the batch's
        time divided by its requests.

        Raises:
            EngineError: where the engine itself fails.
        """
        if not requests:
            return []
        self._forget_encoder_outputs()
        started = time.monotonic()
        outputs = self._answer(requests, {})
        latency = (time.monotonic() - started) / len(requests)
        return [_completion(request, output, latency) for request, output in zip(requests, outputs, strict=True)]

    def logprobs(self, requests: Sequence[ChatRequest], *, tokens: int, top: int = 20) -> list[list[dict[int, float]]]:
        """Log-probabilities of the first answer tokens under greedy decoding.

        Args:
            requests: what is asked; their sampling settings are not used.
            tokens: how many answer tokens.
            top: how many of the likeliest tokens at each place.

        Returns:
            For each request and place a mapping of token id to log-probability, the token that was taken first.

        Raises:
            EngineError: where a request is refused.
        """
        self._forget_encoder_outputs()
        extra = {"logprobs": top, "max_tokens": tokens, "temperature": 0.0, "seed": None}
        found: list[list[dict[int, float]]] = []
        for request, output in zip(requests, self._answer(requests, extra), strict=True):
            if isinstance(output, str):
                raise EngineError(f"vLLM refused the request {request.id}: {output}")
            answer = output.outputs[0]
            places = []
            for token, entries in zip(answer.token_ids, answer.logprobs, strict=True):
                ordered = sorted(entries, key=lambda key: key != token)
                places.append({key: float(entries[key].logprob) for key in ordered})
            found.append(places)
        return found

    def close(self) -> None:
        """Free the model's memory and vLLM's process groups."""
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        with contextlib.suppress(AttributeError):  # only clients of a spawned core have something to shut down
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        cleanup_dist_env_and_memory()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _forget_encoder_outputs(self) -> None:
        if self._llm is None:
            raise EngineError(f"The engine of {self._name} is closed.")
        self._llm.llm_engine.engine_core.reset_encoder_cache()

    def _answer(self, requests: Sequence[ChatRequest], extra: Mapping[str, Any]) -> list[Any]:
        """One vLLM output for each request, or the reason (text) why it was refused."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        parameters = []
        for request in requests:
            settings = {
                "max_tokens": request.max_tokens,
                "temperature": request.temperature,
                "top_p": request.top_p,
                "seed": request.seed,
            }
            parameters.append(SamplingParams(**(settings | dict(extra))))
        try:
            return list(self._llm.chat([r.messages for r in requests], parameters, use_tqdm=False))
        except (ValueError, VLLMClientError) as error:
            # vLLM refuses a batch as a whole: halve it until the bad requests stand alone.
            if len(requests) == 1:
                return [_first_line(error)]
            middle = len(requests) // 2
            return self._answer(requests[:middle], extra) + self._answer(requests[middle:], extra)
        except Exception as error:
            raise EngineError(f"vLLM failed while answering with {self._name}: {_first_line(error)}") from error


def _completion(request: ChatRequest, output: Any, latency_s: float) -> Completion:
    if isinstance(output, str):
        return Completion(request.id, "", "error", 0, 0, latency_s, error=output)
    answer = output.outputs[0]
    return Completion(
        id=request.id,
        text=answer.text,
        finish_reason=answer.finish_reason or "",
        tokens_in=len(output.prompt_token_ids or ()),
        tokens_out=len(answer.token_ids),
        latency_s=latency_s,
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:500]
