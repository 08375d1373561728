# SPDX-License-Identifier: Apache-2.0
"""Small files over MQTT: right, bounded, and only what is published."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgecascade.errors import DownloadFailed
from edgecascade.fleet import relay
from edgecascade.fleet.fetch import Blob, Downloader, Pace
from edgecascade.fleet.relay import BLOCK_BYTES, MAX_FILE_BYTES, MqttSource, answer, read_block
from edgecascade.fleet.sources import Patience, SourceFault, read_file
from edgecascade.service import wire

DATA = random.Random(3).randbytes(3 * BLOCK_BYTES + 5)
NAME = hashlib.sha256(DATA).hexdigest()
PATIENCE = Patience()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("metadata", "blobs", "keys"):
        (tmp_path / "repository" / name).mkdir(parents=True)
    (tmp_path / "repository" / "blobs" / NAME).write_bytes(DATA)
    (tmp_path / "repository" / "metadata" / "timestamp.json").write_bytes(b"{}")
    (tmp_path / "repository" / "keys" / "root-1.pem").write_bytes(b"secret")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "repository" / "blobs" / "link").symlink_to(tmp_path / "secret")
    return tmp_path / "repository"


class Direct:
    """An Asker without a broker. `meddle` may change an answer, or drop it."""

    def __init__(
        self, folder: Path, meddle: Callable[[bytes], bytes | None] = lambda said: said
    ) -> None:
        self.folder, self.meddle, self.asked = folder, meddle, 0

    def exchange(self, name: str, question: bytes, timeout_s: float) -> bytes | None:
        self.asked += 1
        said = answer(self.folder, question)
        return None if said is None else self.meddle(said)


def fetch(asker: Direct, place: Path, offset: int = 0) -> bytes:
    kept = []
    if offset:
        (place / NAME).write_bytes(DATA[:offset])
    source = MqttSource(asker, "mqtt:blobs/", answer_s=0.01)
    loader = Downloader(place, [source], pace=Pace(rounds=2, pause_s=0.01))
    loader.fetch([Blob(NAME, len(DATA))], lambda blob, path: kept.append(path.read_bytes()))
    return kept[0]


def test_a_blob_comes_in_blocks(folder: Path, tmp_path: Path) -> None:
    asker = Direct(folder)
    assert fetch(asker, tmp_path) == DATA
    assert asker.asked == 4


def test_it_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    asker = Direct(folder)
    assert fetch(asker, tmp_path, offset=2 * BLOCK_BYTES) == DATA
    assert asker.asked == 2


def test_lost_and_foreign_answers_are_asked_for_again(folder: Path, tmp_path: Path) -> None:
    rng = random.Random(5)

    def meddle(said: bytes) -> bytes | None:
        return rng.choice((said, said, None, b"junk", said.replace(b'"offset":0', b'"offset":7')))

    assert fetch(Direct(folder, meddle), tmp_path) == DATA


def test_wrong_bytes_are_noticed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed) as failed:
        fetch(Direct(folder, lambda said: said[:-1] + b"x"), tmp_path)
    assert failed.value.reason == "wrong-hash"


def test_metadata_are_read_like_any_small_file(folder: Path) -> None:
    source = MqttSource(Direct(folder))
    assert read_file(source, "metadata/timestamp.json", 100, PATIENCE) == b"{}"
    with pytest.raises(SourceFault, match="404"):
        read_file(source, "metadata/1.root.json", 100, PATIENCE)


@pytest.mark.parametrize(
    "path", ["keys/root-1.pem", "../secret", "blobs/../../secret", "/etc/hostname", "blobs/link",
             "blobs", "", "blobs/a\0b"],
)  # fmt: skip
def test_only_what_is_published_is_given(folder: Path, path: str) -> None:
    said = answer(folder, wire.encode({"id": "x", "path": path, "offset": 0}))
    assert said is not None
    block = read_block(said)
    assert block is not None
    assert (block.status, block.data) == (404, b"")


@pytest.mark.parametrize(
    "question",
    [b"", b"[]", b"null", b'{"id":1}', b"x" * 5000,
     wire.encode({"id": "x" * 100, "path": "a", "offset": 0}),
     wire.encode({"id": "x", "path": "a", "offset": -1}),
     wire.encode({"id": "x", "path": "a", "offset": 1.5})],
)  # fmt: skip
def test_what_is_no_question_gets_no_answer(folder: Path, question: bytes) -> None:
    assert answer(folder, question) is None


def test_a_large_file_does_not_go_this_way(folder: Path) -> None:
    source = MqttSource(Direct(folder), "mqtt:blobs/")
    with pytest.raises(SourceFault, match="do not go over MQTT"):
        source.open(NAME, 0, MAX_FILE_BYTES + 1, None)
    with open(folder / "blobs" / "large", "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(SourceFault, match="416"):
        source.open("large", 0, None, None)


NO_BLOCKS = (
    b"",
    b"\n",
    b"{}\n",
    b'{"id":"x","status":200}\nabc',
    b'{"id":"x","status":"200","offset":0,"size":3}\nabc',
    b'{"id":"x","status":200,"offset":0,"size":-3}\nabc',
)


@pytest.mark.parametrize("said", NO_BLOCKS)
def test_what_is_no_block_is_none(said: bytes) -> None:
    assert read_block(said) is None


def test_a_block_is_bounded() -> None:
    head: dict[str, Any] = {"id": "x", "status": 200, "offset": 0, "size": relay.MAX_FILE_BYTES}
    whole = wire.encode(head) + b"\n" + bytes(BLOCK_BYTES)
    assert read_block(whole) is not None
    assert read_block(whole + b"x") is None
