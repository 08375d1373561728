# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import io
import resource
from pathlib import Path

import numpy as np
import pytest
import zstandard

from edgecascade.errors import UpdateFailed
from edgecascade.fleet import delta

SIZE = 3 * delta.CHUNK + 12_345


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("delta") / "base"
    path.write_bytes(np.random.default_rng(1).bytes(SIZE))
    return path


def restored(base: Path, packed: Path, target: bytes) -> bytes:
    out = io.BytesIO()
    delta.restore(base, packed, len(target), hashlib.sha256(target).hexdigest(), out)
    return out.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("length", [0, 1, delta.CHUNK - 1, delta.CHUNK, SIZE, SIZE + 777])
def test_delta_makes_the_target(base: Path, tmp_path: Path, length: int) -> None:
    target = (base.read_bytes() + b"more than the base has" * 50)[:length]
    target = target[:-9] + b"x" * len(target[-9:])
    size = delta.make(base, write(tmp_path / "new", target), tmp_path / "packed")
    assert size == (tmp_path / "packed").stat().st_size
    assert size < 12_000
    assert restored(base, tmp_path / "packed", target) == target


def test_few_changed_weights_make_a_small_delta(base: Path, tmp_path: Path) -> None:
    data = np.frombuffer(base.read_bytes(), np.uint8).copy()
    data[np.random.default_rng(2).choice(SIZE, SIZE // 500, replace=False)] ^= 16
    size = delta.make(base, write(tmp_path / "new", data.tobytes()), tmp_path / "packed")
    assert size < 0.02 * SIZE
    assert restored(base, tmp_path / "packed", data.tobytes()) == data.tobytes()


def test_wrong_base_is_noticed(base: Path, tmp_path: Path) -> None:
    target = bytes(SIZE)
    delta.make(base, write(tmp_path / "new", target), tmp_path / "packed")
    other = write(tmp_path / "other", base.read_bytes()[::-1])
    with pytest.raises(UpdateFailed, match="promised is"):
        restored(other, tmp_path / "packed", target)


BAD = {
    "bomb": lambda good: zstandard.compress(bytes(1 << 28)),
    "bomb whose frame says so": lambda good: zstandard.ZstdCompressor(
        write_content_size=True
    ).compress(bytes(1 << 28)),
    "truncated": lambda good: good[: len(good) // 2],
    "empty": lambda good: b"",
    "no zstd": lambda good: b"not a frame at all" * 10,
    "one bit": lambda good: good[:200] + bytes([good[200] ^ 1]) + good[201:],
    "one byte less": lambda good: zstandard.compress(zstandard.decompress(good)[:-1]),
    "one byte more": lambda good: zstandard.compress(zstandard.decompress(good) + b"x"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_delta_is_refused_within_bounds(base: Path, tmp_path: Path, case: str) -> None:
    target = base.read_bytes()[:-1] + b"x"
    packer = zstandard.ZstdCompressor(write_content_size=True)
    mixed = np.frombuffer(target, np.uint8) ^ np.frombuffer(base.read_bytes(), np.uint8)
    noise = np.random.default_rng(3).bytes(SIZE // 2)
    good = packer.compress(noise + mixed.tobytes()[len(noise) :])
    packed = write(tmp_path / "packed", BAD[case](good))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = io.BytesIO()
    with pytest.raises(UpdateFailed):
        delta.restore(base, packed, SIZE, hashlib.sha256(target).hexdigest(), out)
    assert out.tell() <= SIZE
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KB


def test_frame_that_asks_for_much_memory_is_refused(base: Path, tmp_path: Path) -> None:
    target = base.read_bytes()
    for window_log, good in ((23, True), (24, False), (27, False)):
        parameters = zstandard.ZstdCompressionParameters(window_log=window_log)
        packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        packed = write(tmp_path / "packed", packer.compress(bytes(SIZE)) + packer.flush())
        if good:
            assert restored(base, packed, target) == target
        else:
            with pytest.raises(UpdateFailed, match="too much memory"):
                restored(base, packed, target)
