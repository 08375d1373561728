# SPDX-License-Identifier: Apache-2.0
"""A bundle: a folder with packed weights, tokenizer and manifest, checked when opened
(docs/bundle-format.md).

with Bundle.open("bundle/") as bundle:
    bundle.config["hidden_size"], bundle.map("lm_head"), bundle.matrix("norm_f")
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecascade import manifest as layout
from edgecascade import verified
from edgecascade.errors import (
    BundleError,
    BundleMismatch,
    EdgeCascadeError,
    InvalidRequest,
    UnsupportedModel,
)
from edgecascade.files import sha256_files
from edgecascade.manifest import Manifest, StoredFile, StoredTensor, parse_json, parse_manifest
from edgecascade.models import family
from edgecascade.tensors import ALIGNMENT, Codec, State

log = logging.getLogger(__name__)

MAX_JSON_BYTES = 64 << 20
UNFINISHED = re.compile(r"\..+\.part-\d+-[0-9a-f]+")  # the folder a build works in
_DTYPES: dict[Codec, np.dtype[Any]] = {Codec.F32: np.dtype("<f4"), Codec.F16: np.dtype("<f2")}


class Bundle:
    """An open bundle. Files are mapped, not read; arrays handed out keep the mapping alive."""

    def __init__(self, path: Path, content: Manifest, bundle_id: str = "") -> None:
        self.path = path
        self.id = bundle_id
        self.manifest = content
        self.family = content.family
        self.config: dict[str, Any] = content.config
        self.precision = content.precision
        self.max_context = content.limits.max_context
        self.kv_type = content.limits.kv_type
        self.tensors: Mapping[str, StoredTensor] = content.tensors
        self.generation: dict[str, Any] = {}
        self.report: dict[str, Any] = {}
        self.chat_template: str | None = None
        self._maps = {name: _map_file(path / name, file) for name, file in content.files.items()}

    @classmethod
    def open(cls, path: str | Path, *, verify: bool | None = None) -> Bundle:
        """Open a bundle after checking all of it.

        `verify` says whether every byte is hashed: True, always; False, never; None, unless this
        user's cache folder says that these very files were hashed before and have not been written
        since.

        Raises:
            InvalidRequest: for a `verify` that says nothing.
            BundleMismatch: for a bundle of another schema or an unknown family.
            BundleError: for anything missing, changed, added or contradictory, with its name and
            values.
        """
        if not isinstance(path, str | os.PathLike) or path == "":  # that is here, to a Path
            raise BundleError(f"bundle is {path!r}; give the path of its folder")
        if not isinstance(verify, bool | None):
            raise InvalidRequest(f"verify is {verify!r}; it must be True, False or None")
        try:
            return cls._open(Path(path), verify)
        except (OSError, ValueError) as error:  # ValueError: a path that cannot be, such as "a\0b"
            raise BundleError(f"cannot read bundle {str(path)!r}: {error}") from error

    @classmethod
    def _open(cls, folder: Path, verify: bool | None) -> Bundle:
        content, bundle_id = _read_manifest(folder)
        _check_folder(folder, content)
        # Mapped before they are hashed: another bundle may take this one's name at any time.
        bundle = cls(folder, content, bundle_id)
        if verify is not False:
            _check_digests(folder, content, trust_stamps=verify is None)
        _check_headers(folder, content)
        _check_model(folder, content)
        bundle._read_texts()
        return bundle

    @property
    def states(self) -> list[State]:
        """What a sequence carries from token to token, by layer."""
        model = family(self.family)
        made: list[State] = model.states(model.read_config(self.config))
        return made

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold tensors, in order."""
        return [self.path / name for name in sorted({t.file for t in self.tensors.values()})]

    def map(self, name: str) -> NDArray[np.uint8]:
        """The tensor's bytes, padding included: a read-only view of the mapped file, on a page
        boundary.
        """
        tensor = self._tensor(name)
        return np.frombuffer(self._mapped(tensor.file), np.uint8, tensor.bytes, tensor.offset)

    def matrix(self, name: str) -> NDArray[Any]:
        """A float32 or float16 tensor as a read-only array of its logical shape, on the mapped
        file.
        """
        tensor = self._tensor(name)
        dtype = _DTYPES.get(tensor.codec)
        if dtype is None:
            raise BundleError(
                f"tensor {name!r} is stored as {tensor.codec.value} blocks; unpack them instead"
            )
        strides = (tensor.stride, tensor.matrix[1] * dtype.itemsize, dtype.itemsize)
        data = self.map(name).data
        made: NDArray[Any] = np.ndarray(
            tensor.shape, dtype, data, strides=strides[-len(tensor.shape) :]
        )
        return made

    @property
    def tokenizer_json(self) -> bytes | None:
        """The tokenizer, None where there is none."""
        there = layout.TOKENIZER in self.manifest.files
        return bytes(self._mapped(layout.TOKENIZER)) if there else None

    def close(self) -> None:
        """Let go of the mappings; the last array that was handed out releases the memory."""
        self._maps.clear()

    def __enter__(self) -> Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tensor(self, name: str) -> StoredTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise BundleError(f"bundle {self.path} has no tensor {name!r}")
        return tensor

    def _read_texts(self) -> None:
        self.generation = self._object(layout.GENERATION)
        self.report = self._object(layout.REPORT)
        template = self._text(layout.CHAT_TEMPLATE)
        try:
            self.chat_template = None if template is None else template.decode()
        except UnicodeDecodeError as error:
            path = self.path / layout.CHAT_TEMPLATE
            raise BundleError(f"{path} is not UTF-8: {error}; {layout.REBUILD}") from None

    def _text(self, name: str) -> bytes | None:
        """A small file's content; None where the bundle has none."""
        if name not in self.manifest.files:
            return None
        data = self._mapped(name)
        _check_small(self.path / name, len(data))
        return bytes(data)

    def _object(self, name: str) -> dict[str, Any]:
        path = self.path / name
        value = parse_json(self._text(name) or b"", str(path))
        if not isinstance(value, dict):
            raise BundleError(
                f"{path} holds {json.dumps(value)[:50]}; expected a JSON object; {layout.REBUILD}"
            )
        return value

    def _mapped(self, name: str) -> mmap.mmap | bytes:
        if not self._maps:
            raise BundleError(f"bundle {self.path} is closed")
        return self._maps[name]


def _read_manifest(folder: Path) -> tuple[Manifest, str]:
    if UNFINISHED.fullmatch(folder.resolve().name):
        raise BundleError(f"{folder} is what an interrupted build left; build again and remove it")
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise BundleError(
            f"bundle {folder} {what}; build one: edgecascade build CHECKPOINT --out {folder}"
        )
    path = folder / layout.MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{folder} has no {layout.MANIFEST}, so it is no bundle; "
            f"a checkpoint becomes one with: edgecascade build {folder} --out BUNDLE"
        )
    _check_small(path, path.stat().st_size)
    data = path.read_bytes()
    return parse_manifest(data, str(path)), hashlib.sha256(data).hexdigest()


def _check_folder(folder: Path, content: Manifest) -> None:
    """Exactly the promised files with exactly the promised sizes, none of them a link."""
    found = {entry.name: entry for entry in folder.iterdir()}
    extra = sorted(found.keys() - content.files.keys() - {layout.MANIFEST, layout.ENGINES})
    if extra:
        shown = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
        raise BundleError(
            f"{folder} holds files that its manifest does not list: {shown}; remove them"
        )
    for name in (layout.MANIFEST, *content.files):
        path = found.get(name)
        if path is None:
            raise BundleError(f"{folder / name} is missing; {layout.REBUILD}")
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{path} is a link or no regular file; put the file itself there")
        promised = content.files.get(name)
        if promised and status.st_size != promised.bytes:
            raise BundleError(
                f"{path} has {status.st_size} bytes, the manifest promises {promised.bytes}; "
                f"{layout.REBUILD}"
            )


def _check_digests(folder: Path, content: Manifest, *, trust_stamps: bool) -> None:
    todo = [
        (folder / name, file.sha256)
        for name, file in content.files.items()
        if not (trust_stamps and verified.is_verified(folder / name, file.sha256))
    ]
    if not todo:
        return
    size = sum(content.files[path.name].bytes for path, _ in todo)
    log.info("hashing %d files of %s, %.2f GB", len(todo), folder, size / 1e9)
    before = [verified.facts(path) for path, _ in todo]
    for (path, promised), facts, actual in zip(
        todo, before, sha256_files([path for path, _ in todo]), strict=True
    ):
        if actual != promised:
            raise BundleError(
                f"{path} was changed: its SHA-256 is {actual}, the manifest promises {promised}; "
                f"{layout.REBUILD}"
            )
        verified.remember(path, facts, actual)


def _check_headers(folder: Path, content: Manifest) -> None:
    """The weight files are safetensors files whose headers say the same as the manifest."""
    for name in content.files:
        tensors = [tensor for tensor in content.tensors.values() if tensor.file == name]
        if tensors:
            path = folder / name
            start = min(tensor.offset for tensor in tensors)
            expected = {
                t.name: ["U8", [t.bytes], [t.offset - start, t.offset - start + t.bytes]]
                for t in tensors
            }
            found = _read_header(path, start)
            if found != expected:
                wrong = sorted(
                    k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k)
                )
                raise BundleError(
                    f"{path}: header and manifest differ about {', '.join(wrong[:5])}: "
                    f"{found.get(wrong[0])} against {expected.get(wrong[0])}; {layout.REBUILD}"
                )


def _read_header(path: Path, start: int) -> dict[str, list[Any]]:
    if not ALIGNMENT <= start <= MAX_JSON_BYTES:
        raise BundleError(
            f"{path}: data start at {start}; expected a page boundary below {MAX_JSON_BYTES}"
        )
    with open(path, "rb") as source:
        head = source.read(start)
    size = int.from_bytes(head[:8], "little")
    if len(head) != start or size != start - 8:
        raise BundleError(
            f"{path}: header of {size} bytes, but data start at {start}; {layout.REBUILD}"
        )
    header = parse_json(head[8:], f"header of {path}")
    if not isinstance(header, dict) or not all(
        isinstance(entry, dict) for entry in header.values()
    ):
        raise BundleError(f"header of {path} is not an object of objects; {layout.REBUILD}")
    return {
        name: [entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _check_model(folder: Path, content: Manifest) -> None:
    """The tensors are those that the family's forward pass reads."""
    try:
        model = family(content.family)
        expected = {
            tensor.name: tensor for tensor in model.tensors(model.read_config(content.config))
        }
    except UnsupportedModel as error:
        raise BundleMismatch(
            f"{folder}: {error}; install the version that wrote the bundle"
        ) from error
    except EdgeCascadeError as error:
        raise BundleError(f"{folder}: config in {layout.MANIFEST}: {error}") from error
    missing = sorted(expected.keys() - content.tensors)
    extra = sorted(content.tensors.keys() - expected)
    if missing or extra:
        raise BundleError(
            f"{folder}: the bundle lacks tensors {missing[:5]}, has unknown ones {extra[:5]}"
        )
    for name, tensor in expected.items():
        stored = content.tensors[name]
        if (stored.shape, stored.role) != (tensor.shape, tensor.role):
            raise BundleError(
                f"{folder}: tensor {name!r} is {stored.role.value} {list(stored.shape)}, "
                f"its config asks for {tensor.role.value} {list(tensor.shape)}"
            )


def _check_small(path: Path, size: int) -> None:
    if size > MAX_JSON_BYTES:
        raise BundleError(f"{path} has {size} bytes; at most {MAX_JSON_BYTES} are read")


def _map_file(path: Path, promised: StoredFile) -> mmap.mmap | bytes:
    with open(path, "rb") as source:
        size = os.fstat(source.fileno()).st_size
        mapped = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    if size != promised.bytes:
        raise BundleError(f"{path} is being replaced; open the bundle again")
    return mapped
