"""The container images that the components run in, named in one place.

Three images follow from the dependencies: ``pipeline`` has no torch, ``train`` has torch and TRL, ``vllm`` has vLLM.
The local runner ignores them; ``pipelines.avrt.build`` replaces them at compile time.
"""

from dataclasses import dataclass

from avrt_lib import __version__


@dataclass(frozen=True)
class Images:
    """References of the three images; with a digest (``name@sha256:…``) a moved tag cannot change a run."""

    pipeline: str = f"avrt-pipeline:{__version__}"
    train: str = f"avrt-train:{__version__}"
    vllm: str = f"avrt-vllm:{__version__}"


DEFAULT = Images()
