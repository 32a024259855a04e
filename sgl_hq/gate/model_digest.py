"""A short name for a checkpoint: the same on every machine, computed in seconds for a checkpoint of any size.

What enters, and why it is enough to tell models apart:

- `config.json` without the keys that change nothing a gate measures (`_IGNORED_KEYS`: who wrote it, in which dtype it
  is loaded, where text ends). All other keys enter, since any of them may scale a logit or turn a rotation.
- every tensor of every `.safetensors` file: name, dtype, shape, and the first and last 512 bytes of its data. Training
  changes every matrix everywhere, so a fine-tuned model differs in them; 100 GB need a few MB of reads. How tensors are
  spread over files does not enter.

Not seen: an edit that spares both ends of every tensor, LoRA adapters, the tokenizer, and options that change the model
when it is loaded. This protects against mistakes, not against forgery.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_IGNORED_KEYS = {
    "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
_EDGE_BYTES = 512
_HEX_DIGITS = 16  # 64 bits: a chance of 1e-13 that two of a thousand models share a digest
_MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library itself


class ModelDigestError(RuntimeError):
    """The checkpoint cannot be identified. One sentence with the remedy."""


def model_digest(model: str, revision: str | None = None) -> str:
    """16 hexadecimal digits. model: a folder, or a hub name whose snapshot is in the local cache.

    Raises ModelDigestError: no such folder or snapshot, no config.json, no readable .safetensors file.
    """
    folder = local_folder(model, revision)
    try:
        config = json.loads((folder / "config.json").read_text())
        digest = hashlib.sha256(json.dumps(_without_ignored(config), sort_keys=True).encode())
        tensors = sorted(tensor for file in _weight_files(folder) for tensor in _tensors(file))
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ModelDigestError(f"cannot read the checkpoint in {folder} ({error}): check that it is complete") from error
    if not tensors:
        raise ModelDigestError(
            f"{folder} has no .safetensors weights, which gate records need: save the model with save_pretrained()"
        )
    for header, edges in tensors:
        digest.update(header.encode() + b"\0" + edges)
    return digest.hexdigest()[:_HEX_DIGITS]


def local_folder(model: str, revision: str | None = None) -> Path:
    """The folder that holds the checkpoint; nothing is downloaded."""
    if (folder := Path(model).expanduser()).is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise ModelDigestError(f"model {model} is neither a folder nor in the local hub cache: download it first")
    return Path(found).parent


def _without_ignored(config: dict) -> dict:
    """`config` and the configs nested in it, without `_IGNORED_KEYS`."""
    return {
        key: _without_ignored(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _IGNORED_KEYS
    }


def _weight_files(folder: Path) -> list[Path]:
    """The files that the index names, where there is one: other weight files beside them are never loaded."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def _tensors(file: Path) -> Iterator[tuple[str, bytes]]:
    """(name, dtype and shape as JSON; first and last bytes) of each tensor. Format: 8 bytes header length, JSON, data."""
    with file.open("rb") as handle:
        (header_bytes,) = struct.unpack("<Q", handle.read(8))
        if header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(f"{file.name} has no safetensors header")
        header = json.loads(handle.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
            edges = _read(handle, begin, min(begin + _EDGE_BYTES, end)) + _read(handle, max(begin, end - _EDGE_BYTES), end)
            yield json.dumps([name, entry["dtype"], entry["shape"]]), edges


def _read(handle: BinaryIO, begin: int, end: int) -> bytes:
    handle.seek(begin)
    data = handle.read(end - begin)
    if len(data) != end - begin:
        raise ValueError(f"{Path(handle.name).name} ends early")
    return data
