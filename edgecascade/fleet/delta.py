# SPDX-License-Identifier: Apache-2.0
"""A blob as its difference from another: XOR, then zstd. Small when few weights moved.

    delta = zstd(target ^ base), the base cut or filled with zeros to the target's length

Whatever a delta makes still has to have the blob's own hash, so a delta can waste time, but not
change a byte. The time is bounded too: never more than the signed size is unpacked, and never with
a window above MAX_WINDOW.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgecascade.errors import UpdateFailed
from edgecascade.fleet.needs import fleet_extra

CHUNK = 1 << 20
MAX_WINDOW = 8 << 20  # the most memory a frame may ask for; also what level 3 uses
LEVEL = 3


def make(base: Path, target: Path, out: Path) -> int:
    """Write the delta from `base` to `target`; its size."""
    with fleet_extra():
        import zstandard

    parameters = zstandard.ZstdCompressionParameters.from_level(
        LEVEL, window_log=MAX_WINDOW.bit_length() - 1, write_checksum=False
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    with open(base, "rb") as old, open(target, "rb") as new, open(out, "xb") as sink:
        with compressor.stream_writer(sink, closefd=False) as packed:
            for chunk in _chunks(new):
                packed.write(_xor(chunk, old.read(len(chunk))))
        return sink.tell()


def apply(base: Path, delta: Path, size: int) -> Iterator[bytes]:
    """The target, a megabyte at a time; exactly `size` bytes.

    Raises:
        UpdateFailed: for a delta that is damaged, or makes more or fewer bytes.
    """
    with fleet_extra():
        import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    made = 0
    with open(base, "rb") as old, open(delta, "rb") as packed:
        reader = unpacker.stream_reader(packed, read_across_frames=False)
        while True:
            try:
                # One byte more than is left tells a longer stream from one that ends here.
                chunk = reader.read(min(CHUNK, size - made + 1))
            except zstandard.ZstdError as error:
                raise UpdateFailed(f"delta {delta.name}: {error}", reason="bad-delta") from error
            made += len(chunk)
            if made > size or (not chunk and made < size):
                raise UpdateFailed(
                    f"delta {delta.name} makes {'more' if made > size else made} bytes of {size}",
                    reason="bad-delta",
                )
            if not chunk:
                return
            yield _xor(chunk, old.read(len(chunk)))


def restore(base: Path, delta: Path, size: int, sha256: str, out: BinaryIO) -> None:
    """Write the target; what was written counts only when this returns.

    Raises:
        UpdateFailed: when it is not the blob that was promised.
    """
    digest = hashlib.sha256()
    for chunk in apply(base, delta, size):
        digest.update(chunk)
        out.write(chunk)
    if digest.hexdigest() != sha256:
        raise UpdateFailed(
            f"delta {delta.name} makes {digest.hexdigest()}, promised is {sha256}",
            reason="bad-delta",
        )


def _chunks(source: BinaryIO) -> Iterator[bytes]:
    while chunk := source.read(CHUNK):
        yield chunk


def _xor(data: bytes, base: bytes) -> bytes:
    mixed: NDArray[np.uint8] = np.frombuffer(data, np.uint8).copy()
    mixed[: len(base)] ^= np.frombuffer(base, np.uint8)
    return mixed.tobytes()
