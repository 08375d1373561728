# SPDX-License-Identifier: Apache-2.0
"""Engines of a bundle: compiled on a device, kept under engines/, loaded only where they belong.

    engines/sm87-tensorrt10.3.0-1a2b3c4d5e6f/
        engine.json     the key, what the build measured, size and digest of every other file
        model.plan      what TensorRT made; no weights
        timing.cache    makes the next build of the same key faster

A plan that meets another TensorRT, GPU, system or set of plugins is refused, never tried: TensorRT
checks some of this itself, the plugins' hash and the bundle nobody but us.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgecascade.bundle import Bundle
from edgecascade.errors import BundleError, BundleMismatch
from edgecascade.files import canonical_json, fsync_folder, write_file
from edgecascade.manifest import ENGINES, parse_json
from edgecascade.nodes import NODES
from edgecascade.trace import graph_hash, trace_bundle

SCHEMA = 1
INDEX, PLAN, TIMING_CACHE = "engine.json", "model.plan", "timing.cache"
MAX_INDEX_BYTES = 1 << 20
PACKAGE = Path(__file__).parent
# What the plan's plugins are: how they answer TensorRT, and the table that they are made from.
PLUGIN_SOURCES = ("nodes.py", "ops.py", "backends/_trt_plugins.py")


@dataclass(frozen=True)
class EngineKey:
    """All that a plan depends on: two keys are equal, or the plan is not loaded."""

    builder: str  # "tensorrt", or "rtx": TensorRT-RTX, whose plans no Jetson runs
    version: str  # of the builder
    sm: int  # compute capability times 10; 0 for a plan that was built without a GPU
    l4t: str  # release of the Jetson's system, "" elsewhere
    plugins: str
    graph: str
    bundle: str

    @property
    def folder(self) -> str:
        """Name of the folder under engines/."""
        return f"sm{self.sm}-{self.builder}{self.version}-{self.plugins[:12]}"


WORDS = {
    "builder": "builder",
    "version": "TensorRT",
    "sm": "SM",
    "l4t": "L4T",
    "plugins": "plugins",
    "graph": "graph",
    "bundle": "bundle",
}


@dataclass(frozen=True)
class Engine:
    """A stored engine whose key and digests were checked."""

    path: Path
    key: EngineKey
    plan: bytes
    facts: Mapping[str, Any]


def plugin_hash(libraries: Sequence[Path] = ()) -> str:
    """Digest of the plugins: their sources, the node table, and the kernel libraries they call.

    The kernels count because a plan holds the size of each plugin's workspace.
    """
    digest = hashlib.sha256()
    for spec in NODES.values():
        digest.update(repr((spec.type, spec.inputs, spec.outputs, spec.attributes)).encode())
    for path in (*(PACKAGE / name for name in PLUGIN_SOURCES), *libraries):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def engine_key(
    bundle: Bundle, *, builder: str, version: str, sm: int, l4t: str | None, plugins: str
) -> EngineKey:
    """The key of a bundle's engine on a device."""
    graph = graph_hash(trace_bundle(bundle), bundle.max_context)
    return EngineKey(builder, version, sm, l4t or "", plugins, graph, bundle.id)


def write_engine(
    bundle: Bundle,
    key: EngineKey,
    plan: bytes,
    facts: Mapping[str, Any],
    timing_cache: bytes | None = None,
) -> Path:
    """Store an engine under its key, all at once; one with the same name is replaced."""
    content = {PLAN: plan, **({} if timing_cache is None else {TIMING_CACHE: timing_cache})}
    index = {
        "schema": SCHEMA,
        "key": asdict(key),
        "facts": dict(facts),
        "files": {name: _promise(data) for name, data in content.items()},
    }
    folder = bundle.path / ENGINES
    folder.mkdir(exist_ok=True)
    with _locked(folder):
        for left in folder.glob(".*.part-*"):  # what an interrupted build left
            shutil.rmtree(left)
        part = folder / f".{key.folder}.part-{os.getpid()}-{secrets.token_hex(4)}"
        part.mkdir()
        for name, data in {**content, INDEX: canonical_json(index)}.items():
            write_file(part / name, data)
        fsync_folder(part)
        made = folder / key.folder
        if made.exists():  # between the two renames there is no engine, which a reader says
            made.rename(part.with_name(part.name + "-old"))
        part.rename(made)
        fsync_folder(folder)
        for left in folder.glob(".*.part-*"):
            shutil.rmtree(left)
    return made


def remove_engine(bundle: Bundle, key: EngineKey) -> None:
    """Delete an engine that proved wrong."""
    folder = bundle.path / ENGINES
    with _locked(folder):
        shutil.rmtree(folder / key.folder)
        fsync_folder(folder)


def read_engine(bundle: Bundle, key: EngineKey) -> Engine:
    """The engine with exactly this key.

    Raises:
        BundleMismatch: when the bundle has none, or only some for something else; both sides named.
        BundleError: when the one that it has is damaged.
    """
    path = bundle.path / ENGINES / key.folder
    if not path.is_dir():
        raise BundleMismatch(_nearest(bundle, key))
    index = _read_index(path, bundle)
    found = _key_of(index, path, bundle)
    if found != key:
        raise BundleMismatch(_differs(path, found, key, bundle))
    files = index["files"]
    return Engine(path, key, _read_file(path, PLAN, files[PLAN], bundle), index["facts"])


def read_timing_cache(bundle: Bundle, key: EngineKey) -> bytes | None:
    """What an earlier build for the same TensorRT and GPU left; a damaged one is worth nothing."""
    path = bundle.path / ENGINES / key.folder
    try:
        index = _read_index(path, bundle)
        promise = index["files"].get(TIMING_CACHE)
        return None if promise is None else _read_file(path, TIMING_CACHE, promise, bundle)
    except BundleError:
        return None


def _promise(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def rebuild(bundle: Bundle) -> str:
    """The command that makes an engine for this machine."""
    return f"build one here: edgecascade engine {bundle.path}"


def _nearest(bundle: Bundle, key: EngineKey) -> str:
    """Why no engine of the bundle will do, by the one that differs least."""
    folder = bundle.path / ENGINES
    others = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir() and not path.name.startswith("."):
            try:
                others.append((_key_of(_read_index(path, bundle), path, bundle), path))
            except BundleError:
                continue
    if not others:
        return f"{bundle.path} has no engine for this machine; {rebuild(bundle)}"
    found, path = min(others, key=lambda other: len(_differences(other[0], key)))
    return _differs(path, found, key, bundle)


def _differences(found: EngineKey, wanted: EngineKey) -> list[str]:
    return [f.name for f in fields(EngineKey) if getattr(found, f.name) != getattr(wanted, f.name)]


def _differs(path: Path, found: EngineKey, wanted: EngineKey, bundle: Bundle) -> str:
    different = _differences(found, wanted)

    def side(key: EngineKey) -> str:
        return ", ".join(f"{WORDS[name]} {_short(getattr(key, name))}" for name in different)

    return (
        f"engine {path} was built for {side(found)}; needed here: {side(wanted)}; {rebuild(bundle)}"
    )


def _short(value: Any) -> str:
    text = str(value) or "(none)"
    return text[:12] if len(text) == 64 else text


def _read_index(path: Path, bundle: Bundle) -> dict[str, Any]:
    """engine.json, in its one canonical spelling and with nothing unknown."""
    file = path / INDEX
    if not _is_regular(file) or file.stat().st_size > MAX_INDEX_BYTES:
        raise BundleError(f"{path} has no readable {INDEX}; {rebuild(bundle)}")
    data = file.read_bytes()
    index = parse_json(data, str(file))
    keys = {"schema", "key", "facts", "files"}
    if not isinstance(index, dict) or index.keys() != keys or canonical_json(index) != data:
        raise BundleError(f"{file} was changed, or is of another version; {rebuild(bundle)}")
    if index["schema"] != SCHEMA:
        raise BundleMismatch(
            f"{file} has schema {index['schema']!r}, this version reads {SCHEMA}; {rebuild(bundle)}"
        )
    files = index["files"]
    if not isinstance(files, dict) or not {PLAN} <= files.keys() <= {PLAN, TIMING_CACHE}:
        raise BundleError(f"{file} does not say which plan it belongs to; {rebuild(bundle)}")
    return index


def _key_of(index: Mapping[str, Any], path: Path, bundle: Bundle) -> EngineKey:
    raw = index["key"]
    kinds = {field.name: int if field.name == "sm" else str for field in fields(EngineKey)}
    if (
        not isinstance(raw, dict)
        or raw.keys() != kinds.keys()
        or any(type(raw[name]) is not kind for name, kind in kinds.items())
    ):
        raise BundleError(f"{path / INDEX} has the key {json.dumps(raw)}; {rebuild(bundle)}")
    return EngineKey(**raw)


def _read_file(path: Path, name: str, promise: Any, bundle: Bundle) -> bytes:
    """A file of exactly the promised size and digest."""
    file = path / name
    if not isinstance(promise, dict) or promise.keys() != {"bytes", "sha256"}:
        raise BundleError(f"{path / INDEX} promises {promise!r} of {name}; {rebuild(bundle)}")
    if not _is_regular(file):
        raise BundleError(f"{file} is missing, or no regular file; {rebuild(bundle)}")
    size = file.stat().st_size
    if size != promise["bytes"]:
        raise BundleError(
            f"{file} has {size} bytes, {INDEX} promises {promise['bytes']}; {rebuild(bundle)}"
        )
    data = file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != promise["sha256"]:
        raise BundleError(
            f"{file} was changed: its SHA-256 is {digest}, {INDEX} promises {promise['sha256']}; "
            f"{rebuild(bundle)}"
        )
    return data


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time."""
    with open(folder / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
