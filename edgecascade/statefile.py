# SPDX-License-Identifier: Apache-2.0
"""A state on disk: what a session resumes from without a prefill (docs/scheduler.md, "On disk").

magic (8 bytes) | header length (u64) | header (canonical JSON) | arrays, one after the other |
SHA-256 of all before
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecascade.backends.base import Snapshot
from edgecascade.errors import BundleMismatch, InvalidRequest, SnapshotError
from edgecascade.files import canonical_json, checked_path, fsync_folder, open_regular

Array = NDArray[Any]

MAGIC = b"ECSTATE\n"
VERSION = 1
MAX_HEADER_BYTES = 64 << 20
DIGEST_BYTES = 32
DTYPES: dict[str, np.dtype[Any]] = {
    "f4": np.dtype("<f4"),
    "f2": np.dtype("<f2"),
    "i1": np.dtype("i1"),
    "i4": np.dtype("<i4"),
}
AGAIN = "save the session again"


@dataclass(frozen=True)
class SavedState:
    """A state, the tokens that led to it, the bundle that made it, and its owner's notes.

    Without tokens there is no state, and the notes are all.
    """

    bundle_id: str
    family: str
    tokens: Array
    snapshot: Snapshot
    extra: Mapping[str, Any] = field(default_factory=dict)  # JSON


def write_state(path: str | Path, state: SavedState) -> None:
    """Write a state; whoever reads `path` sees the old file or all of the new one.

    Raises:
        InvalidRequest: when the file cannot be written, or the path is none.
    """
    target = checked_path(path)
    part = target.with_name(f".{target.name}.part-{os.getpid()}-{secrets.token_hex(4)}")
    arrays = {"tokens": np.asarray(state.tokens, np.int32)}
    arrays.update(
        {f"{layer}.{name}": array for (layer, name), array in state.snapshot.parts.items()}
    )
    header = canonical_json(
        {
            "version": VERSION,
            "bundle": state.bundle_id,
            "family": state.family,
            "arrays": [
                {"name": name, "type": array.dtype.str[1:], "shape": list(array.shape)}
                for name, array in arrays.items()
            ],
            "extra": dict(state.extra),
        }
    )
    try:
        try:
            _write(part, header, list(arrays.values()))
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
        fsync_folder(target.parent)
    except OSError as error:
        raise InvalidRequest(f"the state cannot be written to {target}: {error}") from error


def read_state(path: str | Path, *, bundle_id: str, family: str) -> SavedState:
    """Read a state that this bundle made.

    Raises:
        InvalidRequest: when there is no such file, or the path is none.
        SnapshotError: when it is damaged, or from another version.
        BundleMismatch: when another bundle made it.
    """
    source = checked_path(path)
    try:
        with open_regular(source, follow=True) as file:
            begin = file.read(len(MAGIC))
            if begin != MAGIC:  # perhaps a whole model: not to be read to be told
                raise SnapshotError(f"{source} is not a saved state: it begins with {begin!r}")
            file.seek(0)
            data = file.read()
    except FileNotFoundError as error:
        raise InvalidRequest(
            f"the state {source} is absent, or no regular file; give one that a session wrote"
        ) from error
    except OSError as error:
        raise InvalidRequest(f"the state {source} cannot be read: {error}") from error
    header, start = _checked_header(source, data)
    found = header.get("bundle"), header.get("family")
    if found != (bundle_id, family):
        raise BundleMismatch(
            f"{source} was saved with bundle {found[0]} of family {found[1]}, this one is "
            f"{bundle_id} of family {family}; only its own bundle can go on: start a new session"
        )
    arrays = _arrays(source, header, data, start)
    tokens = arrays.pop("tokens", np.zeros(0, np.int32))
    if tokens.ndim != 1 or tokens.dtype != np.int32:
        raise SnapshotError(f"{source}: its tokens are no list of ids; {AGAIN}")
    parts = {_part_name(source, name): array for name, array in arrays.items()}
    extra = header.get("extra", {})
    return SavedState(bundle_id, family, tokens, Snapshot(len(tokens), parts), extra)


def _write(path: Path, header: bytes, arrays: list[Array]) -> None:
    digest = hashlib.sha256()
    with open(path, "xb") as out:
        for piece in (MAGIC, struct.pack("<Q", len(header)), header, *map(_bytes, arrays)):
            digest.update(piece)
            out.write(piece)
        out.write(digest.digest())
        out.flush()
        os.fsync(out.fileno())


def _bytes(array: Array) -> memoryview | bytes:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data if little.size else b""


def _checked_header(path: Path, data: bytes) -> tuple[dict[str, Any], int]:
    """The header of a file that is what its writer wrote, and where the arrays start."""
    fixed = len(MAGIC) + 8
    body = memoryview(data)[:-DIGEST_BYTES]
    if len(data) < fixed + DIGEST_BYTES or hashlib.sha256(body).digest() != data[-DIGEST_BYTES:]:
        raise SnapshotError(
            f"{path} was cut off or changed: its {len(data)} bytes miss their checksum; {AGAIN}"
        )
    (size,) = struct.unpack_from("<Q", data, len(MAGIC))
    if size > min(MAX_HEADER_BYTES, len(body) - fixed):
        raise SnapshotError(f"{path} promises a header of {size} bytes; {AGAIN}")
    try:
        header = json.loads(data[fixed : fixed + size])
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"{path}: its header is not JSON: {error}; {AGAIN}") from error
    if not isinstance(header, dict) or header.get("version") != VERSION:
        version = header.get("version") if isinstance(header, dict) else None
        raise SnapshotError(f"{path} has version {version}, this program reads {VERSION}; {AGAIN}")
    return header, fixed + size


def _arrays(path: Path, header: dict[str, Any], data: bytes, start: int) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    end = len(data) - DIGEST_BYTES
    entries = header.get("arrays")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SnapshotError(f"{path}: its arrays are no list of objects; {AGAIN}")
    for entry in entries:
        name, shape = str(entry.get("name")), entry.get("shape")
        dtype = DTYPES.get(str(entry.get("type")))
        if (
            dtype is None
            or not isinstance(shape, list)
            or not all(type(n) is int and n >= 0 for n in shape)
        ):
            raise SnapshotError(
                f"{path}: array {name!r} has type {entry.get('type')} and shape {shape}; {AGAIN}"
            )
        count = math.prod(shape)
        if start + count * dtype.itemsize > end:
            raise SnapshotError(
                f"{path}: array {name!r} of shape {shape} runs beyond the file; {AGAIN}"
            )
        arrays[name] = np.frombuffer(data, dtype, count, start).reshape(shape)
        start += count * dtype.itemsize
    if start != end:
        raise SnapshotError(f"{path} holds {end - start} bytes that no array claims; {AGAIN}")
    return arrays


def _part_name(path: Path, name: str) -> tuple[int, str]:
    layer, _, part = name.partition(".")
    if not layer.isdigit() or not part:
        raise SnapshotError(f"{path}: array {name!r} belongs to no layer; {AGAIN}")
    return int(layer), part
