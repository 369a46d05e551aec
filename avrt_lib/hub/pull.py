"""A model of a hub: one commit of it, its files checked, prepared where it needs that, and published.

The token is read from ``HF_TOKEN`` by the hub's own library, and ``HF_ENDPOINT`` names another hub. Nothing else in
this package asks a hub.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from avrt_lib.config import HUB
from avrt_lib.errors import ConfigError, DataError, EnvironmentProblem
from avrt_lib.hub import folder as folders
from avrt_lib.hub import prepare
from avrt_lib.hub.folder import Published
from avrt_lib.tables import sha256_file

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

log = logging.getLogger("avrt.hub")

DEFAULT_ENDPOINT = "https://huggingface.co"
#: Weights of other libraries.
_OTHER_WEIGHTS = (".gguf", ".onnx", ".msgpack", ".tflite", ".mlmodel", ".nemo", ".ot")


@dataclass(frozen=True, slots=True)
class Reference:
    """A hub model's id and, where one is to be merged into it, the folder of an adapter in the same repository."""

    repository: str
    adapter: str | None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read ``ORG/NAME`` or ``ORG/NAME/ADAPTER``, with or without ``hub:``.

        Raises:
            ConfigError: where it is neither.
        """
        parts = text.removeprefix(HUB).split("/")
        if len(parts) not in (2, 3) or not all(parts) or any(part in (".", "..") for part in parts):
            raise ConfigError(f"{text!r} is no model of a hub: write ORG/NAME, or ORG/NAME/ADAPTER.")
        return cls("/".join(parts[:2]), parts[2] if len(parts) == 3 else None)

    @property
    def name(self) -> str:
        """The id as a configuration writes it behind ``hub:``."""
        return f"{self.repository}/{self.adapter}" if self.adapter else self.repository


def pull(reference: Reference, revision: str, to: str) -> Published:
    """Fetch one commit of a model and publish it.

    A pull that was cut short goes on where it stopped. Pickles stay behind, but for an adapter's, which is merged into
    the model and converted.

    Args:
        reference: which model.
        revision: a branch, tag or commit; the commit that it names now is what is fetched and recorded.
        to: ``s3://BUCKET``, or a folder.

    Raises:
        ConfigError: no such model or revision, no permission, or no safetensors.
        EnvironmentProblem: the hub cannot be reached.
        DataError: a file is not what the hub says.
    """
    from huggingface_hub import HfApi, snapshot_download

    endpoint = os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT)
    with _hub_errors(reference.repository, revision, endpoint):
        info = HfApi(endpoint=endpoint).model_info(reference.repository, revision=revision, files_metadata=True)
    commit = str(info.sha)
    wanted = wanted_files([entry.rfilename for entry in info.siblings or []], reference.adapter)
    if not any(name.endswith(folders.SAFETENSORS) and "/" not in name for name in wanted):
        raise ConfigError(
            f"{reference.repository} publishes no safetensors at {commit}: take a revision that does, or download it "
            "by hand and convert it with `avrt models prepare`."
        )
    made_by = {"by": "avrt models pull", "model": reference.name, "revision": commit, "requested": revision}
    with folders.staging(to, f"{reference.name}-{commit}") as staged:
        with _hub_errors(reference.repository, commit, endpoint):
            snapshot_download(
                reference.repository, revision=commit, local_dir=staged, allow_patterns=wanted, endpoint=endpoint
            )
        shutil.rmtree(staged / ".cache", ignore_errors=True)
        verify_downloads(staged, info, wanted)
        if reference.adapter is not None:
            address = prepare.publish_prepared(staged, reference.name, to, made_by, adapter=reference.adapter)
        else:
            address = folders.publish(staged, reference.name, to, {**made_by, "code": folders.code_of(staged)})
    return Published(reference.name, commit, address)


def wanted_files(names: list[str], adapter: str | None) -> list[str]:
    """The files of a repository that are fetched: those at its top that are no pickles, and all of the adapter's.

    >>> wanted_files(["config.json", "spk_dict.pt", "think/a.bin", "onnx/model.onnx", "README.md"], "think")
    ['config.json', 'think/a.bin', 'README.md']
    """
    left = (*folders.PICKLES, *_OTHER_WEIGHTS)
    return [
        name
        for name in names
        if (adapter is not None and name.startswith(f"{adapter}/"))
        or ("/" not in name and not name.lower().endswith(left) and not name.startswith("."))
    ]


def verify_downloads(folder: Path, info: ModelInfo, wanted: list[str]) -> None:
    """Compare each downloaded file with the hash that the hub gave: SHA-256 of large files, Git's own of others.

    Raises:
        DataError: the first file that differs; it is removed, so that the next pull fetches it again.
    """
    for entry in info.siblings or []:
        if entry.rfilename not in wanted:
            continue
        path = folder / entry.rfilename
        if entry.lfs is not None:
            same = path.is_file() and sha256_file(path) == entry.lfs.sha256
        elif entry.blob_id:
            same = path.is_file() and _git_sha1(path) == entry.blob_id
        else:
            same = path.is_file()
        if not same:
            path.unlink(missing_ok=True)
            raise DataError(f"{path} is not what the hub says: pull the model again.")


def _git_sha1(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


@contextmanager
def _hub_errors(name: str, revision: str, endpoint: str) -> Iterator[None]:
    """Turn what the hub's library raises into errors that say the mend; none of them holds the token."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise EnvironmentProblem(
            "HF_HUB_OFFLINE forbids to ask the hub: unset it for this command, or bring the model by disk and use "
            "`avrt models import`."
        ) from error
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{name} is gated: accept its terms at {endpoint}/{name}, and set HF_TOKEN to a token of that account."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(f"{name} has no revision {revision}: see {endpoint}/{name}/commits/main.") from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"{endpoint} has no model {name}, or it is private: check the id, and set HF_TOKEN where it is private."
        ) from error
    except Exception as error:
        # The hub's library changed its HTTP client, and may again: its errors are told by where they are defined.
        transport = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")
        if not transport and not isinstance(
            error, errors.HfHubHTTPError | errors.LocalEntryNotFoundError | ConnectionError | TimeoutError
        ):
            raise
        raise EnvironmentProblem(
            f"{endpoint} cannot be reached or failed ({type(error).__name__}): start the same command again, which "
            "goes on where it stopped, or bring the model by disk and use `avrt models import`."
        ) from error
