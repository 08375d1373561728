# SPDX-License-Identifier: Apache-2.0
"""Small files over MQTT, where the broker's port is all there is: metadata, releases, small blobs.

    repo/get/<agent>   {"id": "...", "path": "metadata/timestamp.json", "offset": 0}
    repo/rx/<agent>    {"id": "...", "status": 200, "offset": 0, "size": 412}\\n followed by a block

A block has at most 64 KB, a file at most 16 MB: large weights go over HTTP. Whoever answers is not
trusted: hashes and signatures decide, as for every other source.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgecascade.files import open_regular
from edgecascade.fleet.sources import Body, SourceFault, checked_path
from edgecascade.service import wire
from edgecascade.service.config import BrokerAddress
from edgecascade.service.mqtt import Link, LinkOptions
from edgecascade.service.protocol import Incoming
from edgecascade.service.replies import Outgoing
from edgecascade.service.topics import Topics

SCHEME = "mqtt:"  # as a repository's address: the agent's own broker
BLOCK_BYTES = 64 << 10
MAX_FILE_BYTES = 16 << 20
MAX_ASK_BYTES = 2048
MAX_HEAD_BYTES = 512
ANSWER_S = 5.0
TRIES = 4
FOLDERS = ("metadata", "targets", "blobs")


class Asker(Protocol):
    """A connection that questions can be sent over."""

    def exchange(self, name: str, question: bytes, timeout_s: float) -> bytes | None:
        """Send a question; the answer of that name, or None when none comes in time."""


@dataclass(frozen=True)
class Block:
    """A piece of a file, and the size of the whole; status as in HTTP."""

    name: str
    status: int
    offset: int = 0
    size: int = 0
    data: bytes = b""


class MqttSource:
    """See sources.Source. `place` is mqtt: and a folder of the repository, if it is not all."""

    def __init__(self, asker: Asker, place: str = SCHEME, answer_s: float = ANSWER_S) -> None:
        self.name = place
        self._folder = place.removeprefix(SCHEME)
        self._asker, self._answer_s = asker, answer_s

    def open(self, path: str, start: int, size: int | None, etag: str | None) -> Body:
        """See sources.Source."""
        path = checked_path(self._folder + path)
        if size is not None and size > MAX_FILE_BYTES:
            raise SourceFault("too-large", f"{size} bytes do not go over MQTT", lasting=True)
        stopped: list[bool] = []
        first = self._ask(path, start, stopped)
        if size is not None and first.size != size:
            raise SourceFault("wrong-size", f"{first.size} bytes instead of {size}", lasting=True)
        blocks, at = [first.data], start

        def read(limit: int) -> bytes:
            nonlocal at
            if at >= first.size:
                return b""
            data = blocks.pop() if blocks else self._ask(path, at, stopped).data
            at += len(data)
            return data

        return Body(
            start,
            read,
            abort=lambda: stopped.append(True),
            close=lambda: None,
            length=first.size - start,
        )

    def _ask(self, path: str, offset: int, stopped: list[bool]) -> Block:
        for _ in range(TRIES):
            if stopped:
                raise SourceFault("unreachable", "stopped")
            name = secrets.token_hex(8)
            question = wire.encode({"id": name, "path": path, "offset": offset})
            answer = self._asker.exchange(name, question, self._answer_s)
            block = None if answer is None else read_block(answer)
            if block is None or block.name != name:
                continue
            if block.status != 200:
                reason = "absent" if block.status == 404 else "wrong-answer"
                raise SourceFault(reason, f"{path}: status {block.status}", lasting=True)
            if block.offset == offset and (block.data or offset == block.size):
                return block
        raise SourceFault("unreachable", f"no block of {path} within {TRIES * self._answer_s:g} s")


def read_block(payload: bytes) -> Block | None:
    """An answer; None for what is not one."""
    head, newline, data = payload[: MAX_HEAD_BYTES + 1].partition(b"\n")
    if not newline:
        return None
    data = payload[len(head) + 1 :]
    try:
        raw = wire.decode(head)
        name, status, offset, size = (raw[key] for key in ("id", "status", "offset", "size"))
    except (wire.BadJson, KeyError, TypeError):
        return None
    good = isinstance(name, str) and all(type(n) is int and n >= 0 for n in (status, offset, size))
    if not good or len(data) > BLOCK_BYTES:
        return None
    return Block(name, status, offset, size, data)


def answer(folder: Path, question: bytes) -> bytes | None:
    """What the side of the repository says to a question; None to what is not one."""
    if len(question) > MAX_ASK_BYTES:
        return None
    try:
        raw = wire.decode(question)
        name, path, offset = raw["id"], raw["path"], raw["offset"]
    except (wire.BadJson, KeyError, TypeError):
        return None
    if not (isinstance(name, str) and len(name) <= 64 and isinstance(path, str)):
        return None
    if type(offset) is not int or offset < 0:
        return None
    block = _block(folder, name, path, offset)
    head = {"id": name, "status": block.status, "offset": block.offset, "size": block.size}
    return wire.encode(head) + b"\n" + block.data


def _block(folder: Path, name: str, path: str, offset: int) -> Block:
    with contextlib.suppress(SourceFault, OSError):
        if checked_path(path).split("/")[0] not in FOLDERS:
            return Block(name, 404)
        with open_regular(folder / path) as source:
            size = os.fstat(source.fileno()).st_size
            if size > MAX_FILE_BYTES or offset > size:
                return Block(name, 416, offset, size)
            source.seek(offset)
            return Block(name, 200, offset, size, source.read(BLOCK_BYTES))
    return Block(name, 404)


class Relay:
    """Answers agents' questions for the files of a repository, over a broker."""

    def __init__(self, folder: Path, address: BrokerAddress, name: str, prefix: str) -> None:
        self._folder, self._topics = folder, Topics(prefix)
        options = LinkOptions(address, name, (self._topics.repo_get("+"),), forget=True)
        self.link = Link(options, self._asked)

    def __enter__(self) -> Relay:
        self.link.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.link.stop()

    def _asked(self, message: Incoming) -> None:
        # On the link's thread: a block is read in less time than it takes to send.
        address = self._topics.parse(message.topic)
        if address is not None and address.kind == "repo-get" and not message.retain:
            said = answer(self._folder, message.payload)
            if said is not None:
                self.link.publish(Outgoing(self._topics.repo_rx(address.device), said))
