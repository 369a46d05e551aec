"""Tiny random models in the layouts in which the paper's models are published, and a hub that serves folders."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"

#: Python as a model of the Kimi-VL kind brings it along: two modules, one of which imports the other.
PROCESSING = "from .image_processing_tiny import TinyImages\n\n\nclass TinyProcessor:\n    images = TinyImages\n"
IMAGES = "class TinyImages:\n    patch_size = 14\n"


def save_qwen(folder: Path, *, seed: int = 0) -> Path:
    """A tiny Qwen2 text model of random weights."""
    import torch

    from avrt_lib import compat

    compat.apply()
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    Qwen2ForCausalLM(Qwen2Config(**_LANGUAGE, tie_word_embeddings=False)).save_pretrained(folder)
    return folder


_LANGUAGE: dict[str, Any] = {
    "vocab_size": 448,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
}


def save_flamingo(folder: Path, *, seed: int = 0) -> Path:
    """A tiny Audio Flamingo 3 as its repository has it, with its tokenizer and feature extractor, without ``think``."""
    import torch
    from safetensors.torch import load_file, save_file

    from avrt_lib.miniature import families  # before transformers: it closes the gaps of a CPU's torchvision

    # isort: split
    from transformers import (
        AudioFlamingo3Config,
        AudioFlamingo3ForConditionalGeneration,
        AudioFlamingo3Processor,
        WhisperFeatureExtractor,
    )

    torch.manual_seed(seed)
    template = families._template("", "<sound>", "")
    tokenizer = families.build_tokenizer(["<sound>"], template)
    config = AudioFlamingo3Config(
        audio_config={
            "num_mel_bins": 128,
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        text_config={**_LANGUAGE, "model_type": "qwen2", "tie_word_embeddings": False},
        audio_token_id=tokenizer.convert_tokens_to_ids("<sound>"),
    )
    model = AudioFlamingo3ForConditionalGeneration(config)
    families._set_generation(model, tokenizer)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file({_published(name): value for name, value in load_file(file).items()}, file, {"format": "pt"})
    AudioFlamingo3Processor(
        WhisperFeatureExtractor(feature_size=128, chunk_length=30), tokenizer, chat_template=template
    ).save_pretrained(folder)
    return folder


def _published(name: str) -> str:
    """The published files' name of a tensor, which vLLM expects; transformers 5.19 writes another one."""
    if name.endswith("lm_head.weight"):
        return "language_model.lm_head.weight"
    return re.sub(r"^(model\.)?language_model\.(model\.)*", "language_model.model.", name).removeprefix("model.")


def add_think(folder: Path, *, rank: int = 4, alpha: int = 8) -> dict[str, Any]:
    """A random think adapter beside a tiny Audio Flamingo 3: LoRA, and a pickle with the projector's other weights.

    Returns:
        What should become of each changed tensor of the base, computed here by itself.
    """
    import torch
    from safetensors.torch import load_file, save_file

    think = folder / "think"
    think.mkdir()
    base = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    adapter, wanted = {}, {}
    for name, weight in base.items():
        if name.startswith("language_model.model.layers.") and name.endswith(("q_proj.weight", "down_proj.weight")):
            down = torch.randn(rank, weight.shape[1]) * 0.2
            up = torch.randn(weight.shape[0], rank) * 0.2
            plain = name.removesuffix(".weight")
            adapter[f"base_model.model.{plain}.lora_A.weight"] = down
            adapter[f"base_model.model.{plain}.lora_B.weight"] = up
            wanted[name] = weight + alpha / rank * (up @ down)
    others = {
        name: torch.randn_like(weight) for name, weight in base.items() if name.startswith("multi_modal_projector.")
    }
    assert adapter
    assert others
    save_file(adapter, think / "adapter_model.safetensors")
    torch.save({f"base_model.model.{name}": value for name, value in others.items()}, think / "non_lora_trainables.bin")
    document = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "target_modules": ["q_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    (think / "adapter_config.json").write_text(json.dumps(document))
    return {**wanted, **others}


def save_with_code(folder: Path, *, processing: str = "processing_tiny.TinyProcessor") -> Path:
    """A model whose processor is Python of its own, as Kimi-VL's is."""
    save_qwen(folder)
    (folder / "processing_tiny.py").write_text(PROCESSING)
    (folder / "image_processing_tiny.py").write_text(IMAGES)
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": processing}}))
    return folder


@contextmanager
def serving(repositories: dict[str, Path], *, token: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as a model hub does: its API for one revision, and its files with their hashes.

    Args:
        repositories: folder by id; every revision is ``COMMIT``.
        token: refuse requests that do not carry it.

    Yields:
        The address, and a list that grows by the path of each file that is sent.
    """
    sent: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
                self.reply(401, b"{}", {"X-Error-Code": "GatedRepo"}, body)
                return
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                name, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
                if name not in repositories:
                    self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
                elif revision not in ("main", COMMIT):
                    self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
                elif parts[4:5] == ["tree"]:
                    self.reply(200, json.dumps(tree(repositories[name])).encode(), {}, body)
                else:
                    self.reply(200, json.dumps(described(name, repositories[name])).encode(), {}, body)
                return
            file = repositories["/".join(parts[:2])] / "/".join(parts[4:])
            data = file.read_bytes()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(file)}"', "Accept-Ranges": "bytes"}
            status, wanted = 200, self.headers.get("Range")
            if wanted and body:
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                status, data = 206, data[start:]
            if body:
                sent.append("/".join(parts[4:]))
            self.reply(status, data, headers, body)

        def reply(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def described(name: str, folder: Path) -> dict[str, Any]:
    """A repository as the hub's API describes it: large files with their SHA-256, others with Git's hash."""
    siblings = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        entry: dict[str, Any] = {"rfilename": path.relative_to(folder).as_posix(), "size": path.stat().st_size}
        entry["blobId"] = _git_sha1(path)
        if path.suffix in (".safetensors", ".bin"):
            entry["lfs"] = {"sha256": _sha256(path), "size": path.stat().st_size, "pointerSize": 130}
        siblings.append(entry)
    return {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}


def tree(folder: Path) -> list[dict[str, Any]]:
    """The same files as the API's listing of a revision has them."""
    entries = []
    for sibling in described("", folder)["siblings"]:
        entry = {"type": "file", "path": sibling["rfilename"], "size": sibling["size"], "oid": sibling["blobId"]}
        if "lfs" in sibling:
            entry["lfs"] = {"oid": sibling["lfs"]["sha256"], "size": sibling["size"], "pointerSize": 130}
        entries.append(entry)
    return entries


def _etag(path: Path) -> str:
    return _sha256(path) if path.suffix in (".safetensors", ".bin") else _git_sha1(path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git_sha1(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
