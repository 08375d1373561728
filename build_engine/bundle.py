# SPDX-License-Identifier: Apache-2.0
"""Writes a bundle (docs/bundle-format.md): in a hidden sibling folder first, then all at once under
its name.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from build_engine.presets import Planned, preset
from edgecascade import manifest as layout
from edgecascade import verified
from edgecascade.bundle import Bundle
from edgecascade.errors import BuildError
from edgecascade.files import canonical_json, fsync_folder, write_file
from edgecascade.manifest import Limits, Manifest, StoredFile, StoredTensor
from edgecascade.tensors import ALIGNMENT, round_up
from edgecascade.version import package_version

log = logging.getLogger(__name__)

# A weight file is what a fleet update sends and stores once: small enough that a change in one
# place moves little, large enough that 17 GB are some hundred files.
SPLIT_BYTES = 64 << 20
SPARE_BYTES = 64 << 20  # for the small files, on top of the weights


@dataclass(frozen=True)
class Identity:
    """What the manifest says about the model."""

    family: str
    precision: str
    config: dict[str, Any]
    limits: Limits


def identity(family: str, config: dict[str, Any], max_context: int, precision: str) -> Identity:
    """What the manifest says about a model built with this preset."""
    return Identity(family, precision, config, Limits(max_context, preset(precision).kv_type))


class _File(NamedTuple):
    name: str
    header: bytes
    tensors: list[StoredTensor]


class BundleWriter:
    """Writes weights in the planned order, in bounded memory; `finish` makes them a bundle.

    Leaving the `with` block before `finish` removes everything written. A build that was killed
    leaves a folder that no `Bundle.open` accepts and that the next build of the same name removes.

    Raises:
        BuildError: when the target exists, the disk is full or cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        identity: Identity,
        plan: Sequence[Planned],
        *,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(os.path.abspath(path))
        self.identity = identity
        self._overwrite = overwrite
        self._files = _lay_out(plan)
        self._todo = iter([(file, tensor) for file in self._files for tensor in file.tensors])
        self._current: StoredTensor | None = None
        self._left = 0
        self._finished = False
        self._sink: _Sink | None = None
        self._done: dict[str, StoredFile] = {}
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        with _os_errors(self.path):
            _clear_up(self.path)
        _check_target(self.path, overwrite=overwrite)
        with _os_errors(self.path):
            self._made_parents = _missing_parents(self.path)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _check_space(
                self.path, sum(planned.tensor.stored_bytes(planned.codec) for planned in plan)
            )
            token = f"{os.getpid()}-{secrets.token_hex(4)}"
            self.folder = self.path.with_name(f".{self.path.name}.part-{token}")
            self.folder.mkdir()
            self._lock = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        if self._sink is not None:
            self._sink.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        if not self._finished:
            _remove_empty(self._made_parents)

    @property
    def total_bytes(self) -> int:
        """Bytes of all planned tensors."""
        return sum(tensor.bytes for file in self._files for tensor in file.tensors)

    def write(self, name: str, data: NDArray[Any]) -> None:
        """Append the next bytes of tensor `name`, padding included. Keep `data` unchanged: a thread
        writes it.
        """
        if self._left == 0:
            self._next_tensor()
        planned = self._current.name if self._current else "nothing"
        if planned != name or data.nbytes > self._left or self._sink is None:
            raise BuildError(
                f"{data.nbytes} bytes of {name!r} arrived where {self._left} of {planned!r} were "
                "planned"
            )
        self._left -= data.nbytes
        self._wait()
        self._pending = self._pool.submit(self._sink.write, data.reshape(-1).view(np.uint8).data)

    def draft(self) -> Bundle:
        """The weights as a bundle, for checks before `finish`. There is no manifest on the disk
        yet.
        """
        self._complete()
        return Bundle(self.folder, self._manifest())

    def finish(self, texts: Mapping[str, bytes], generation: Any, report: Any) -> Path:
        """Write the small files and the manifest, wait for the disk, and put the bundle under its
        name.
        """
        self._complete()
        small = {
            **texts,
            layout.GENERATION: canonical_json(generation),
            layout.REPORT: canonical_json(report),
        }
        with _os_errors(self.path):
            for name, data in small.items():
                write_file(self.folder / name, data)
                self._done[name] = StoredFile(len(data), hashlib.sha256(data).hexdigest())
            write_file(self.folder / layout.MANIFEST, self._manifest().to_json())
            fsync_folder(self.folder)
            _check_target(self.path, overwrite=self._overwrite)  # hours may have passed
            _put(self.folder, self.path, overwrite=self._overwrite)
            self._finished = True
            fsync_folder(self.path.parent)
            for name, file in self._done.items():
                verified.remember(self.path / name, verified.facts(self.path / name), file.sha256)
        log.info("wrote %s", self.path)
        return self.path

    def _manifest(self) -> Manifest:
        return Manifest(
            generator=f"edgecascade {package_version()}",
            family=self.identity.family,
            precision=self.identity.precision,
            config=self.identity.config,
            limits=self.identity.limits,
            tensors={tensor.name: tensor for file in self._files for tensor in file.tensors},
            files=dict(self._done),
        )

    def _next_tensor(self) -> None:
        file, self._current = next(self._todo, (None, None))
        if file is None or self._current is None:
            return
        self._left = self._current.bytes
        if self._sink is None or self._sink.name != file.name:
            self._close_sink()
            with _os_errors(self.path):
                self._sink = _Sink(self.folder / file.name)
                self._sink.write(memoryview(file.header))

    def _wait(self) -> None:
        if self._pending is not None:
            with _os_errors(self.path):
                self._pending.result()
            self._pending = None

    def _close_sink(self) -> None:
        self._wait()
        if self._sink is not None:
            self._pending = self._pool.submit(self._seal, self._sink)
            self._sink = None

    def _seal(self, sink: _Sink) -> None:
        self._done[sink.name] = sink.finish()

    def _complete(self) -> None:
        self._close_sink()
        self._wait()
        missing = [tensor.name for _, tensor in self._todo]
        if self._left or missing:
            raise BuildError(
                f"{self._left} bytes and {len(missing)} more tensors were planned but never written"
            )


class _Sink:
    """One weight file: hashed while it is written, on the disk when finished."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by finish() or close()
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, data: memoryview) -> None:
        self._digest.update(data)
        self._bytes += len(data)
        while len(data):
            data = data[self._file.write(data) :]

    def finish(self) -> StoredFile:
        with self._file:
            os.fsync(self._file.fileno())
        return StoredFile(self._bytes, self._digest.hexdigest())

    def close(self) -> None:
        self._file.close()


def _lay_out(plan: Sequence[Planned]) -> list[_File]:
    """Whole tensors behind each file's header; a new file for each layer and past SPLIT_BYTES.

    Where files end depends on names and shapes alone, and no file knows its number, so a tensor
    that did not change is in the same bytes again.
    """
    groups: list[list[Planned]] = [[]]
    size = 0
    for planned in plan:
        stored = planned.tensor.stored_bytes(planned.codec)
        before = groups[-1][-1] if groups[-1] else planned
        if _layer(before) != _layer(planned) or (groups[-1] and size + stored > SPLIT_BYTES):
            groups.append([])
            size = 0
        groups[-1].append(planned)
        size += stored
    return [
        _place(f"weights-{i:05}-of-{len(groups):05}.safetensors", group)
        for i, group in enumerate(groups, 1)
    ]


def _layer(planned: Planned) -> str:
    """The layer of a tensor: layers.7 of layers.7.norm, and nothing for what is in none."""
    found = re.match(r"layers\.\d+(?=\.)", planned.tensor.name)
    return found[0] if found else ""


def _place(name: str, group: Sequence[Planned]) -> _File:
    entries: dict[str, Any] = {"__metadata__": {"format": "edgecascade"}}
    ends = [0]
    for tensor, codec in group:
        ends.append(ends[-1] + tensor.stored_bytes(codec))
        entries[tensor.name] = {
            "dtype": "U8",
            "shape": [ends[-1] - ends[-2]],
            "data_offsets": [ends[-2], ends[-1]],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    start = round_up(8 + len(text), ALIGNMENT)
    # The format allows spaces behind the text.
    header = (start - 8).to_bytes(8, "little") + text.ljust(start - 8)
    tensors = [
        StoredTensor(
            tensor.name, tensor.role, codec, tensor.shape, name, start + begin, end - begin
        )
        for (tensor, codec), (begin, end) in zip(group, pairwise(ends), strict=True)
    ]
    return _File(name, header, tensors)


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free space there, or choose another folder" if full else "check the folder"
        raise BuildError(f"cannot write {path}: {error}; {advice}") from error


def _check_target(path: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise BuildError(f"{path} exists; choose another folder, or replace it with --overwrite")
    replaceable = path.is_dir() and not path.is_symlink()
    if not replaceable or (any(path.iterdir()) and not (path / layout.MANIFEST).is_file()):
        raise BuildError(
            f"{path} exists and is no bundle; remove it yourself, or choose another folder"
        )


def _missing_parents(path: Path) -> list[Path]:
    """Folders above `path` that the build will make, innermost first."""
    return [folder for folder in path.parents if not folder.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return  # somebody else uses it by now


def _check_space(path: Path, weight_bytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < weight_bytes + SPARE_BYTES:
        raise BuildError(
            f"{path.parent} has {free / 1e9:.2f} GB free, the bundle needs "
            f"{(weight_bytes + SPARE_BYTES) / 1e9:.2f} GB; free space there, or choose another "
            "folder"
        )


def _clear_up(path: Path) -> None:
    """Remove what killed builds of this target left, and give a bundle back its name that one of
    them had taken. A living build holds a lock on its folders.
    """
    hidden = f".{glob.escape(path.name)}"
    for folder in [*path.parent.glob(f"{hidden}.old-*"), *path.parent.glob(f"{hidden}.part-*")]:
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # not a folder, or already gone
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.name.startswith(f".{path.name}.old-") and not path.exists():
                log.warning("%s is back, after a build that was interrupted", path)
                os.rename(folder, path)
                continue
            log.warning("removing %s, left by a build that was interrupted", folder)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            log.info("%s belongs to a build that is running", folder)
        finally:
            os.close(lock)


def _put(folder: Path, path: Path, *, overwrite: bool) -> None:
    """Give the finished folder its name; an old bundle keeps the name until then."""
    if overwrite and path.exists():
        # The old bundle is now in `folder`, which the writer removes when it is left.
        _rename(folder, path, _RENAME_EXCHANGE)
    else:
        _rename(folder, path, _RENAME_NOREPLACE)


_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_AT_FDCWD = -100


def _rename(source: Path, target: Path, flags: int) -> None:
    """renameat2(2): Python's os.rename can neither swap nor refuse to replace an empty folder."""
    renameat2: Callable[..., int] = ctypes.CDLL(None, use_errno=True).renameat2
    names = os.fsencode(source), os.fsencode(target)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(flags)) == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(number, os.strerror(number), str(target))
    _rename_in_two_steps(source, target, swap=flags == _RENAME_EXCHANGE)


def _rename_in_two_steps(source: Path, target: Path, *, swap: bool) -> None:
    """For file systems without renameat2's flags: between the two steps the name is missing for a
    moment. A build that is killed there leaves the old bundle to the next one, which restores it.
    """
    if not swap:
        os.rename(source, target)
        return
    old = target.with_name(f".{target.name}.old-{os.getpid()}-{secrets.token_hex(4)}")
    lock = os.open(target, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(target, old)
        try:
            os.rename(source, target)
        except OSError:
            os.rename(old, target)
            raise
        os.rename(old, source)  # as an exchange leaves it, for whoever built to remove
    finally:
        os.close(lock)
