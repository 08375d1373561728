# SPDX-License-Identifier: Apache-2.0
"""Durable files: data before names, names before success."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from edgecascade.errors import InvalidRequest

HASH_CHUNK_BYTES = 4 << 20


def canonical_json(value: Any) -> bytes:
    """The one way this project writes a JSON document: sorted keys, ASCII, no NaN.

    A reader compares a file with its own re-serialisation, so that white space, repeated keys and
    spellings of a number cannot hide a change.
    """
    text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    return text.encode() + b"\n"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text, as json.loads takes it for its `object_pairs_hook`.

    Raises:
        ValueError: for a key that is given twice, of which another reader might take the first.
    """
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} is given twice")
            seen.add(key)
    return value


def no_constant(word: str) -> NoReturn:
    """NaN and Infinity are not JSON; json.loads takes this for its `parse_constant`.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{word} is not JSON")


def checked_path(path: object) -> Path:
    """The path of a file.

    Raises:
        InvalidRequest: for what cannot be one.
    """
    name = os.fsdecode(path) if isinstance(path, str | os.PathLike) else ""
    if not Path(name).name or "\0" in name:
        raise InvalidRequest(f"path is {path!r}; give the path of a file")
    return Path(name)


def open_regular(path: Path, *, follow: bool = False) -> BinaryIO:
    """Open a file to read. Links may lead anywhere and pipes wait for ever: they count as absent.

    `follow`: the caller chose the path, so a link leads where it should.

    Raises:
        FileNotFoundError: for anything but a regular file.
    """
    absent = FileNotFoundError(errno.ENOENT, "no such regular file", str(path))
    links = 0 if follow else os.O_NOFOLLOW
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | links)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            raise absent from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise absent
    return open(fd, "rb")


def write_file(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a file and wait until its data are on the disk. `mode` counts from the first byte."""
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file in place of the one that is there; it is on the disk when this returns.

    Whoever is cut off leaves the old one, and nothing beside it where the disk is full. The caller
    keeps other writers away.
    """
    part = path.with_name(f".{path.name}.part-")  # hidden: folders of these are served and globbed
    part.unlink(missing_ok=True)  # of a writer that was killed
    try:
        write_file(part, data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        error.filename = error.filename or str(path)  # a full disk does not say which
        raise
    fsync_folder(path.parent)


def fsync_file(path: Path) -> None:
    """Wait until a file's data are on the disk."""
    _fsync(path, os.O_NOFOLLOW)


def fsync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    _fsync(path, os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(HASH_CHUNK_BYTES))
    with open(path, "rb", buffering=0) as source:
        while size := source.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def sha256_files(paths: list[Path]) -> list[str]:
    """Hex digests of several files, read side by side: hashing releases the interpreter lock."""
    workers = max(1, min(len(paths), len(os.sched_getaffinity(0))))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(sha256_file, paths))
