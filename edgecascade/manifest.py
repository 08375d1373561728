# SPDX-License-Identifier: Apache-2.0
"""manifest.json of a bundle, read strictly: docs/bundle-format.md says what each key means.

Nothing here opens a file: bytes in, a checked `Manifest` out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from edgecascade.errors import BundleError, BundleMismatch
from edgecascade.files import canonical_json, no_constant
from edgecascade.tensors import ALIGNMENT, ARRAYS, Codec, Role, matrix_bytes, round_up

SCHEMA = 1
MANIFEST = "manifest.json"
GENERATION = "generation.json"
REPORT = "report.json"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
ENGINES = "engines"  # a folder, made on the device, that the manifest does not list
NEEDED = frozenset({GENERATION, REPORT})
OPTIONAL = frozenset({TOKENIZER, CHAT_TEMPLATE})

REBUILD = "copy the bundle again, or rebuild it: edgecascade build CHECKPOINT --out BUNDLE"

_WEIGHTS = re.compile(r"weights-\d{5}-of-\d{5}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
_MAX_DIMENSION = 2**31 - 1  # ec_weight holds sizes in int32


@dataclass(frozen=True)
class StoredTensor:
    """Where and how a tensor lies in a bundle.

    `shape` is logical: [n], [n, k] or [experts, n, k]. Matrix e starts at `offset + e * stride` of
    the file.
    """

    name: str
    role: Role
    codec: Codec
    shape: tuple[int, ...]
    file: str
    offset: int
    bytes: int

    @property
    def experts(self) -> int:
        """Number of stacked matrices; 1 for a single one."""
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of one matrix; a vector is one row."""
        rows, columns = (1, *self.shape)[-2:]
        return rows, columns

    @property
    def matrix_bytes(self) -> int:
        """Bytes of one matrix without the padding to a page."""
        return matrix_bytes(self.codec, *self.matrix)

    @property
    def stride(self) -> int:
        """Bytes from one stacked matrix to the next."""
        return round_up(self.matrix_bytes, ALIGNMENT)


@dataclass(frozen=True)
class StoredFile:
    """Size and digest that a file of the bundle must have."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Limits:
    """What a runtime may ask of the bundle."""

    max_context: int
    kv_type: str  # "f32" or "f16"


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json."""

    generator: str
    family: str
    precision: str
    config: dict[str, Any]
    limits: Limits
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]

    def to_json(self) -> bytes:
        """The file's bytes, with the digest of everything else in it."""
        body: dict[str, Any] = {
            "schema": SCHEMA,
            "generator": self.generator,
            "family": self.family,
            "precision": self.precision,
            "config": self.config,
            "limits": asdict(self.limits),
            "tensors": {name: _tensor_json(tensor) for name, tensor in self.tensors.items()},
            "files": {name: asdict(file) for name, file in self.files.items()},
        }
        return canonical_json({**body, "digest": _digest(body)})


def parse_manifest(data: bytes, what: str) -> Manifest:
    """Read manifest.json; `what` names the file in messages.

    Raises:
        BundleMismatch: for a schema of another version.
        BundleError: for anything that differs from what `Manifest.to_json` writes.
    """
    raw = _object(parse_json(data, what), what)
    if raw.get("schema") != SCHEMA or type(raw["schema"]) is not int:
        raise BundleMismatch(
            f"{what}: schema is {raw.get('schema')!r}, this version reads {SCHEMA}; "
            "install the version that wrote the bundle, or rebuild it"
        )
    digest = raw.pop("digest", None)
    try:
        actual = _digest(raw)
        changed = digest != actual or canonical_json({**raw, "digest": digest}) != data
    except RecursionError:
        raise BundleError(f"{what} is nested too deeply; {REBUILD}") from None
    except ValueError as error:  # a number beyond a float, such as 1e999
        raise BundleError(f"{what} is not valid JSON ({error}); {REBUILD}") from None
    try:
        manifest = _manifest(raw, what)
    except BundleError as error:
        hint = " (the file's own digest does not fit either: it was changed)" if changed else ""
        raise BundleError(f"{error}{hint}; {REBUILD}") from None
    if changed:
        raise BundleError(
            f"{what} was changed after it was written: its digest says {digest!r}, "
            f"its content gives {actual}; {REBUILD}"
        )
    return manifest


def parse_json(data: bytes, what: str) -> Any:
    """Parse JSON without NaN and Infinity.

    Raises:
        BundleError: naming `what` and the place.
    """
    try:
        return json.loads(data, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{what} is not valid JSON ({error}); {REBUILD}") from None


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(body)).hexdigest()


def _tensor_json(tensor: StoredTensor) -> dict[str, Any]:
    return {
        "role": tensor.role.value,
        "codec": tensor.codec.value,
        "shape": list(tensor.shape),
        "file": tensor.file,
        "offset": tensor.offset,
        "bytes": tensor.bytes,
    }


def _manifest(raw: dict[str, Any], what: str) -> Manifest:
    keys = {"schema", "generator", "family", "precision", "config", "limits", "tensors", "files"}
    _exact_keys(raw, keys, what)
    files = {
        name: _file(name, value, what)
        for name, value in _object(raw["files"], f"{what}: files").items()
    }
    missing = sorted(NEEDED - files.keys())
    if missing:
        raise BundleError(f"{what}: files lacks {', '.join(missing)}")
    tensors = {
        name: _tensor(name, value, files, what)
        for name, value in _object(raw["tensors"], f"{what}: tensors").items()
    }
    _check_overlap(tensors, files, what)
    return Manifest(
        generator=_text(raw, "generator", what),
        family=_text(raw, "family", what),
        precision=_text(raw, "precision", what),
        config=_object(raw["config"], f"{what}: config"),
        limits=_limits(raw["limits"], f"{what}: limits"),
        tensors=tensors,
        files=files,
    )


def _limits(value: Any, what: str) -> Limits:
    raw = _object(value, what)
    _exact_keys(raw, {"max_context", "kv_type"}, what)
    if raw["kv_type"] not in ("f32", "f16"):
        raise BundleError(f"{what}: kv_type is {raw['kv_type']!r}; expected 'f32' or 'f16'")
    return Limits(_integer(raw, "max_context", what, least=1), raw["kv_type"])


def is_bundle_file(name: str) -> bool:
    """Whether a bundle may hold a file of this name: nothing absolute, no "..", no folder."""
    return name in NEEDED | OPTIONAL | {MANIFEST} or bool(_WEIGHTS.fullmatch(name))


def _file(name: str, value: Any, what: str) -> StoredFile:
    if not is_bundle_file(name) or name == MANIFEST:
        raise BundleError(f"{what}: files lists {name!r}, which is no file of a bundle")
    what = f"{what}: files[{name!r}]"
    raw = _object(value, what)
    _exact_keys(raw, {"bytes", "sha256"}, what)
    sha256 = _text(raw, "sha256", what)
    if not _SHA256.fullmatch(sha256):
        raise BundleError(f"{what}: sha256 is {sha256!r}; expected 64 lower-case hex digits")
    return StoredFile(_integer(raw, "bytes", what), sha256)


def _tensor(name: str, value: Any, files: Mapping[str, StoredFile], what: str) -> StoredTensor:
    if not _TENSOR_NAME.fullmatch(name):
        raise BundleError(f"{what}: {name!r} is no tensor name")
    what = f"{what}: tensors[{name!r}]"
    raw = _object(value, what)
    _exact_keys(raw, {"role", "codec", "shape", "file", "offset", "bytes"}, what)
    try:
        role, codec = Role(raw["role"]), Codec(raw["codec"])
    except ValueError as error:
        raise BundleError(f"{what}: {error}") from None
    tensor = StoredTensor(
        name=name,
        role=role,
        codec=codec,
        shape=_shape(raw["shape"], what),
        file=_text(raw, "file", what),
        offset=_integer(raw, "offset", what),
        bytes=_integer(raw, "bytes", what),
    )
    _check_place(tensor, files, what)
    return tensor


def _shape(value: Any, what: str) -> tuple[int, ...]:
    sizes = value if isinstance(value, list) else []
    good = all(type(size) is int and 0 < size <= _MAX_DIMENSION for size in sizes)
    if not (1 <= len(sizes) <= 3 and good):
        raise BundleError(
            f"{what}: shape is {value!r}; expected one to three sizes from 1 to {_MAX_DIMENSION}"
        )
    return tuple(sizes)


def _check_place(tensor: StoredTensor, files: Mapping[str, StoredFile], what: str) -> None:
    file = files.get(tensor.file)
    if file is None or not _WEIGHTS.fullmatch(tensor.file):
        raise BundleError(
            f"{what}: file is {tensor.file!r}, which is no weight file of this bundle"
        )
    if tensor.role in ARRAYS and tensor.codec is not Codec.F32:
        raise BundleError(
            f"{what}: role {tensor.role.value} is always f32, found {tensor.codec.value}"
        )
    expected = tensor.experts * tensor.stride
    if tensor.bytes != expected:
        raise BundleError(
            f"{what}: bytes is {tensor.bytes}, but shape {list(tensor.shape)} in "
            f"{tensor.codec.value} takes {expected}"
        )
    if tensor.offset % ALIGNMENT:
        raise BundleError(f"{what}: offset {tensor.offset} is not a multiple of {ALIGNMENT}")
    if tensor.offset + tensor.bytes > file.bytes:
        raise BundleError(
            f"{what}: ends at {tensor.offset + tensor.bytes}, but {tensor.file} has {file.bytes} "
            "bytes"
        )


def _check_overlap(
    tensors: Mapping[str, StoredTensor], files: Mapping[str, StoredFile], what: str
) -> None:
    """Within each weight file the tensors follow each other without a gap, and end with the
    file.
    """
    for name in sorted(file for file in files if _WEIGHTS.fullmatch(file)):
        inside = sorted((t for t in tensors.values() if t.file == name), key=lambda t: t.offset)
        if not inside:
            raise BundleError(f"{what}: {name} holds no tensor")
        for before, after in pairwise(inside):
            if before.offset + before.bytes != after.offset:
                raise BundleError(
                    f"{what}: in {name}, {before.name!r} ends at {before.offset + before.bytes} "
                    f"and {after.name!r} starts at {after.offset}"
                )
        end = inside[-1].offset + inside[-1].bytes
        if end != files[name].bytes:
            raise BundleError(
                f"{what}: tensors of {name} end at {end}, the file has {files[name].bytes} bytes"
            )


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BundleError(f"{what} is {type(value).__name__}; expected a JSON object")
    return value


def _exact_keys(raw: Mapping[str, Any], expected: set[str], what: str) -> None:
    unknown, missing = sorted(raw.keys() - expected), sorted(expected - raw.keys())
    if unknown or missing:
        raise BundleError(f"{what}: unknown keys {unknown}, missing keys {missing}")


def _text(raw: Mapping[str, Any], key: str, what: str) -> str:
    value = raw[key]
    if not isinstance(value, str) or not 0 < len(value) <= 1000:
        raise BundleError(f"{what}: {key} is {value!r}; expected a text of 1 to 1000 characters")
    return value


def _integer(raw: Mapping[str, Any], key: str, what: str, *, least: int = 0) -> int:
    value = raw[key]
    if type(value) is not int or not least <= value < 2**53:
        raise BundleError(f"{what}: {key} is {value!r}; expected an integer from {least}")
    return value
