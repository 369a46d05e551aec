"""A model folder as it may be published: weights as safetensors, nothing that could run when it is loaded."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avrt_lib.config import StoreConfig
from avrt_lib.errors import ConfigError, DataError
from avrt_lib.models import is_published, verify_manifest, write_manifest
from avrt_lib.tables import MANIFEST, locked, read_json, sha256_file

#: Weights in formats that are Python pickles, or may hold one; loading such a file can run any code.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".h5")
SAFETENSORS = ".safetensors"
INDEX = ".safetensors.index.json"
SUMS = "SHA256SUMS"
_CODE_FILES = ("config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True, slots=True)
class Published:
    """A model after ``pull``, ``importing`` or ``prepare``: its id, commit (None: not known) and address."""

    name: str
    revision: str | None
    address: str


def slug(name: str) -> str:
    """The name under which a model is published: the last part of its id, and the adapter where it has one.

    >>> slug("Qwen/Qwen2.5-Omni-3B"), slug("nvidia/audio-flamingo-3-hf/think")
    ('qwen2.5-omni-3b', 'audio-flamingo-3-hf-think')

    Raises:
        ConfigError: where nothing of it can be part of an address.
    """
    parts = name.strip("/").split("/")
    found = re.sub(r"[^a-z0-9.]+", "-", "-".join(parts[1:] or parts).lower()).strip("-.")
    if not found:
        raise ConfigError(f"{name!r} is no name of a model: say with --name which it is, as ORG/NAME.")
    return found


def source_folder(source: Path, to: str) -> Path:
    """The folder of a model that came by disk, by a path whose last part may become the model's name.

    Raises:
        DataError: where it is no folder.
        ConfigError: where the model would be published inside of it.
    """
    if not source.is_dir():
        raise DataError(f"There is no folder {source}.")
    if not to.startswith("s3://") and Path(to).expanduser().resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"--to {to} is inside of the model's folder {source}: name a folder outside of it.")
    return source if source.name not in ("", "..") else source.resolve()


def pickles(folder: Path) -> list[Path]:
    """Files below a folder that are, or may hold, pickles."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICKLES and path.is_file())


def check(folder: Path) -> None:
    """Check that a folder is a whole model of safetensors without pickles.

    Raises:
        DataError: what is missing, damaged or refused, and how to mend it.
    """
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} is not a model folder: it has no config.json.")
    found = pickles(folder)
    if found:
        raise DataError(
            f"{found[0]} may be a pickle, which can run any code when it is loaded: "
            f"`avrt models prepare {folder} --to …` turns weights into safetensors; remove other such files."
        )
    weights = sorted(folder.glob(f"*{SAFETENSORS}"))
    if not weights:
        raise DataError(f"{folder} has no weights: there is no *.safetensors file in it.")
    present: dict[str, set[str]] = {path.name: tensor_names(path) for path in weights}
    for index in sorted(folder.glob(f"*{INDEX}")):
        for tensor, file in read_json(index)["weight_map"].items():
            if tensor not in present.get(file, set()):
                raise DataError(
                    f"{index} says that {file} holds {tensor}, but it does not: copy the whole folder again."
                )


def tensor_names(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file.

    Raises:
        DataError: where it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as handle:
            return set(handle.keys())
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged or cut short ({error}): copy it again.") from error


def verify_sums(folder: Path) -> int:
    """Check the files of a folder against its ``SHA256SUMS`` (as ``sha256sum`` writes it) and its manifest.

    Returns:
        How many files were compared; 0 where the folder has neither.

    Raises:
        DataError: the first file that differs or is missing.
    """
    compared = 0
    if (folder / MANIFEST).is_file():
        compared += len(verify_manifest(folder)["files"])
    if (folder / SUMS).is_file():
        for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
            wanted, _, name = line.strip().partition(" ")
            path = folder / name.strip().removeprefix("*").removeprefix("./")
            if not name:
                continue
            if not path.is_file() or sha256_file(path) != wanted.lower():
                raise DataError(f"{path} is not what {SUMS} says: copy it again.")
            compared += 1
    return compared


def code_of(folder: Path) -> dict[str, str]:
    """The model's own Python: SHA-256 by file name; empty where transformers and vLLM know the model by themselves.

    Raises:
        ConfigError: where the code is of another repository, or a file of it is missing.
    """
    modules: set[str] = set()
    for name in (*_CODE_FILES, "tokenizer_config.json"):
        path = folder / name
        references = read_json(path).get("auto_map", {}) if path.is_file() else {}
        for value in references.values() if isinstance(references, dict) else []:
            for reference in value if isinstance(value, list) else [value]:
                if not reference:
                    continue
                if "--" in reference:
                    raise ConfigError(
                        f"{path} takes {reference} from another repository: put its files into the folder, and write "
                        f"{reference.split('--')[1]} instead."
                    )
                modules.add(str(reference).rpartition(".")[0])
    files: dict[str, str] = {}
    for module in sorted(modules):
        _add_module(folder, module, files)
    return files


def _add_module(folder: Path, module: str, files: dict[str, str]) -> None:
    path = folder / f"{module}.py"
    if path.name in files:
        return
    if not path.is_file():
        raise ConfigError(
            f"{folder} needs its own code from {path.name}, which is not there: take all files of one commit."
        )
    files[path.name] = sha256_file(path)
    for imported in re.findall(r"^\s*from\s+\.(\w+)\s+import\b", path.read_text(encoding="utf-8"), re.MULTILINE):
        _add_module(folder, imported, files)


def publish(folder: Path, name: str, to: str, made_by: dict[str, Any]) -> str:
    """Give a checked folder its manifest and publish it by its content hash.

    Args:
        folder: it is moved where ``to`` is a folder, and stays where it is the store.
        name: the model's id.
        to: ``s3://BUCKET``, or a folder (a mounted volume, for example).
        made_by: for the manifest.

    Returns:
        The address that a configuration names: ``s3://BUCKET/models/NAME/SHA256`` or ``FOLDER/NAME/SHA256``.

    Raises:
        DataError: where the folder is no whole model of safetensors.
        StoreError: where something else lies at this address.
    """
    check(folder)
    manifest = write_manifest(folder, made_by)
    if to.startswith("s3://"):
        from avrt_lib.store.objects import publish_model

        return publish_model(folder, slug(name), StoreConfig(kind="s3", bucket=bucket_of(to))).uri
    target = Path(to).expanduser().absolute() / slug(name) / str(manifest["content_sha256"])
    with locked(target):
        if is_published(target, manifest):
            shutil.rmtree(folder)
        else:
            shutil.move(folder, target)
    return str(target)


def bucket_of(to: str) -> str:
    """The bucket of ``s3://BUCKET``.

    Raises:
        ConfigError: where more than a bucket is named: a model's place in it is fixed.
    """
    bucket = to.removeprefix("s3://").strip("/")
    if not bucket or "/" in bucket:
        raise ConfigError(f"--to takes s3://BUCKET, not {to}: models lie below models/NAME/SHA256 in it.")
    return bucket


@contextmanager
def staging(to: str, name: str) -> Iterator[Path]:
    """A folder where a model is put together before it is published: on the disk where it will stay, or in the cache.

    One process at a time has it. It goes away when the block ends well; otherwise the next block finds what was there.
    """
    from avrt_lib.hub.cache import cache_folder

    root = cache_folder() if to.startswith("s3://") else Path(to).expanduser().absolute()
    folder = root / ".incoming" / slug(name)
    with locked(folder):
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
