# SPDX-License-Identifier: Apache-2.0
"""Reads a Hugging Face checkpoint folder: config.json and safetensors files, lazily, in BF16, F16
or F32.

Rows are read with pread into fresh arrays, never mapped: what is read is all that is held.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgecascade.errors import CheckpointError, UnsupportedModel
from edgecascade.files import open_regular, unique_keys
from edgecascade.manifest import MANIFEST

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
MAX_SMALL_BYTES = 64 << 20  # of JSON and of a chat template
MAX_JSON_DEPTH = 100  # the manifest's writer and its readers recurse
DOWNLOAD_AGAIN = "download the checkpoint again"

PREFIXES = ("backbone.", "model.")
# Tensors that the family's forward pass does not use, by the reason why.
IGNORED = {"mtp.": "the draft head for speculation"}

# BF16 has no NumPy type: its 16 bits travel as uint16.
DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}
ITEM_BYTES = {
    name: size
    for size, names in (
        (1, "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0"),
        (2, "I16 U16 BF16 F16"),
        (4, "I32 U32 F32"),
        (8, "I64 U64 F64 C64"),
    )
    for name in names.split()
}
QUANTIZED_SUFFIXES = (
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_2",
    ".weight_scale_inv",
    ".qweight",
    ".qzeros",
    ".g_idx",
)


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a checkpoint; `name` as in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int  # in the file
    bytes: int


class Checkpoint:
    """An open checkpoint: `config`, and `tensors` by name without the "backbone." or "model."
    prefix.

    Raises:
        CheckpointError: for anything missing, damaged or contradictory.
        UnsupportedModel: for a checkpoint that is already quantized.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"checkpoint {self.folder} is no folder")
        has_config = os.path.lexists(self.folder / "config.json")
        if (self.folder / MANIFEST).exists() and not has_config:
            raise CheckpointError(f"{self.folder} is a bundle; give the checkpoint that it is of")
        self.config = read_json(self.folder / "config.json")
        refuse_quantized_config(self.folder, self.config)
        self.tensors = _by_name(_headers(self.folder))

    def read(self, source: SourceTensor, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) as [rows, columns]; BF16 as uint16. All axes but the last count as
        rows.
        """
        columns = source.shape[-1]
        dtype = DTYPES[source.dtype]
        out: NDArray[Any] = np.empty((stop - start, columns), dtype)
        view = out.reshape(-1).view(np.uint8).data
        offset = source.offset + start * columns * dtype.itemsize
        with _open(source.file) as data:
            while len(view):
                size = os.preadv(data.fileno(), [view], offset)
                if size == 0:
                    raise CheckpointError(
                        f"{source.file} ends at {offset}, inside {source.name}; {DOWNLOAD_AGAIN}"
                    )
                view, offset = view[size:], offset + size
        return out

    def optional_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the checkpoint, {} when it is absent."""
        path = self.folder / name
        return read_json(path) if os.path.lexists(path) else {}


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """A hub's cache is a folder of links, so they are followed; what they lead to must be a file:
    a pipe is waited for for ever, and a device may have no end.
    """
    try:
        with open_regular(path, follow=True) as data:
            yield data
    except PermissionError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; let this user read it"
        ) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {DOWNLOAD_AGAIN}") from error


def read_small(path: Path) -> bytes:
    """All of a file.

    Raises:
        CheckpointError: when it is missing, no regular file or too large.
    """
    with _open(path) as data:
        size = os.fstat(data.fileno()).st_size
        if size > MAX_SMALL_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; at most {MAX_SMALL_BYTES} are read")
        return data.read()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; the bare word Infinity, which some writers emit, is accepted.

    Raises:
        CheckpointError: when it is missing, too large or no JSON object.
    """
    return parse_json(read_small(path), path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in what was read from a file; see read_json.

    Raises:
        CheckpointError: when it is no JSON object.
    """
    try:
        value = _plain(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; {DOWNLOAD_AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}; expected a JSON object")
    return value


def refuse_quantized_config(folder: Path, config: Mapping[str, Any]) -> None:
    """A quantized checkpoint would be quantized twice."""
    method = config.get("quantization_config")
    if isinstance(method, dict):
        method = method.get("quant_method", "unknown")
    if method is None and os.path.lexists(folder / "hf_quant_config.json"):
        method = "modelopt"
    if method is not None:
        raise UnsupportedModel(
            f"{folder} is already quantized ({method}); start from the BF16 checkpoint it was made "
            "from"
        )


def _plain(value: Any, depth: int = 0) -> Any:
    """Spell infinities as transformers does, {"__float__": "Infinity"}, so that the result is JSON
    everywhere.
    """
    if depth > MAX_JSON_DEPTH:
        raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} deep")
    if isinstance(value, dict):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            raise ValueError("it holds NaN")
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    return value


def _headers(folder: Path) -> list[SourceTensor]:
    """All tensors of the folder, those of an index checked against it."""
    index, single = folder / INDEX, folder / SINGLE
    if not os.path.lexists(index):
        if not os.path.lexists(single):
            raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; {DOWNLOAD_AGAIN}")
        return read_header(single)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; {DOWNLOAD_AGAIN}")
    shards = sorted({_shard_name(index, name, shard) for name, shard in weight_map.items()})
    if os.path.lexists(single) and SINGLE not in shards:
        raise CheckpointError(
            f"{folder} has {SINGLE}, and {INDEX} of other files: two sets of weights; remove the "
            "one that is not meant"
        )
    missing = [shard for shard in shards if not os.path.isfile(folder / shard)]
    if missing:
        raise CheckpointError(
            f"{index} names shards that are not there: {listed(missing)}; {DOWNLOAD_AGAIN}"
        )
    found = [tensor for shard in shards for tensor in read_header(folder / shard)]
    places = {(tensor.name, tensor.file.name) for tensor in found}
    promised = set(weight_map.items())
    if places != promised:
        raise CheckpointError(
            f"{index} and its shards disagree: not where the index says "
            f"{listed(promised - places)}; "
            f"not in the index {listed(places - promised)}; {DOWNLOAD_AGAIN}"
        )
    return found


def _shard_name(index: Path, name: str, shard: object) -> str:
    plain = (
        isinstance(shard, str)
        and shard == os.path.basename(shard)
        and shard.endswith(".safetensors")
    )
    if not plain or str(shard).startswith("."):
        raise CheckpointError(
            f"{index} puts {name!r} into {shard!r}, which is no safetensors file beside it"
        )
    return str(shard)


def read_header(path: Path) -> list[SourceTensor]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: unless the tensors cover the file exactly, without gap or overlap.
    """
    with _open(path) as source:
        file_bytes = os.fstat(source.fileno()).st_size
        size = int.from_bytes(source.read(8), "little")
        if not 2 <= size <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise CheckpointError(
                f"{path}: header length {size} is impossible in a file of {file_bytes} bytes; "
                f"{DOWNLOAD_AGAIN}"
            )
        text = source.read(size)
    try:
        header = json.loads(text.decode(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: header is not valid JSON: {error}; {DOWNLOAD_AGAIN}"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is no JSON object; {DOWNLOAD_AGAIN}")
    header.pop("__metadata__", None)
    start = 8 + size
    tensors = [_entry(path, name, entry, start) for name, entry in header.items()]
    _check_cover(path, tensors, start, file_bytes)
    return tensors


def _entry(path: Path, name: str, entry: Any, start: int) -> SourceTensor:
    fields = entry if isinstance(entry, dict) else {}
    dtype: Any = fields.get("dtype")
    shape: Any = fields.get("shape")
    offsets: Any = fields.get("data_offsets")
    known = isinstance(dtype, str) and dtype in ITEM_BYTES
    if not known or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: entry of {name!r} is {str(entry)[:200]}; {DOWNLOAD_AGAIN}")
    begin, end = offsets
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: {name!r} is {dtype} {shape}, {expected} bytes, but has {end - begin}; "
            f"{DOWNLOAD_AGAIN}"
        )
    return SourceTensor(name, dtype, tuple(shape), path, start + begin, end - begin)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**53 for item in value
    )


def _check_cover(path: Path, tensors: list[SourceTensor], start: int, file_bytes: int) -> None:
    end = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.bytes)):
        if tensor.offset != end:
            what = "overlaps the one before" if tensor.offset < end else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: {tensor.name!r} {what} ({tensor.offset} after {end}); {DOWNLOAD_AGAIN}"
            )
        end += tensor.bytes
    if end != file_bytes:
        state = "truncated" if file_bytes < end else "too long"
        raise CheckpointError(
            f"{path} is {state}: it has {file_bytes} bytes, its header promises {end}; "
            f"{DOWNLOAD_AGAIN}"
        )


def _by_name(found: Iterable[SourceTensor]) -> dict[str, SourceTensor]:
    tensors: dict[str, SourceTensor] = {}
    ignored: dict[str, int] = {}
    for tensor in found:
        name = tensor.name
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name = name[len(prefix) :]
                break
        reason = next((why for start, why in IGNORED.items() if name.startswith(start)), None)
        if reason is not None:
            ignored[reason] = ignored.get(reason, 0) + 1
        elif name in tensors:
            raise CheckpointError(f"{tensor.name!r} and {tensors[name].name!r} are the same tensor")
        elif name.endswith(QUANTIZED_SUFFIXES):
            raise UnsupportedModel(
                f"tensor {tensor.name!r} belongs to a quantized checkpoint; start from the BF16 "
                "checkpoint"
            )
        else:
            tensors[name] = tensor
    for reason, count in ignored.items():
        log.info("left out %d tensors: %s", count, reason)
    return tensors


def listed(names: Iterable[Any], most: int = 10) -> str:
    """Up to `most` names, and how many more."""
    ordered = sorted(map(str, names))
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return (", ".join(ordered[:most]) or "none") + more
