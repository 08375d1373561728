# SPDX-License-Identifier: Apache-2.0
"""Rows of a checkpoint become the bytes of the bundle: by the kernel library, or by NumPy where it
is not built.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from build_engine.bundle import BundleWriter
from build_engine.presets import Planned
from build_engine.quantize import LARGEST, codes_and_scales
from build_engine.read import Model, Piece, padding
from edgecascade.backends._lib import cpu_library
from edgecascade.blocks import dequantize, pack_blocks
from edgecascade.errors import BackendUnavailable, CheckpointError, InvalidRequest
from edgecascade.tensors import ALIGNMENT, Codec, Tensor, matrix_bytes

log = logging.getLogger(__name__)

ERROR_ROWS = 64  # of every piece are compared with what was stored

NOT_FINITE = "is no number: the checkpoint is damaged, download it again"
TOO_LARGE = "cannot hold: build with --precision exact"

Array = NDArray[Any]
Progress = Callable[[int, int], None]  # bytes stored so far, bytes in all


class Packer(Protocol):
    """Turns rows [n, k] into blocks."""

    def __call__(self, piece: Piece, codec: Codec) -> Array:
        """The blocks' bytes; InvalidRequest for a value that has no code."""


class NativePacker:
    """The kernel library's pack(), on all cores."""

    def __init__(self) -> None:
        self._library = cpu_library()
        self._stream = self._library.stream()

    def __call__(self, piece: Piece, codec: Codec) -> Array:
        """See Packer."""
        out = np.empty(matrix_bytes(codec, *piece.values.shape), np.uint8)
        self._library.pack(self._stream, piece.values, piece.dtype, codec, out)
        return out


def numpy_packer(piece: Piece, codec: Codec) -> Array:
    """The definition, much slower than the library."""
    rows = piece.widened()
    if not (np.abs(rows) <= LARGEST[codec]).all():
        raise InvalidRequest(f"a value is beyond {LARGEST[codec]}")
    return pack_blocks(codec, *codes_and_scales(codec, rows))


def packer() -> Packer:
    """The library's packer, or NumPy's with a warning."""
    try:
        return NativePacker()
    except BackendUnavailable as error:
        log.warning("packing with NumPy, which is slow: %s", error)
        return numpy_packer


@dataclass
class StoredError:
    """How far a stored tensor is from the checkpoint: relative Frobenius norm over sampled rows."""

    rows: int = 0
    difference: float = 0.0
    norm: float = 0.0

    def add(self, stored: Array, rows: Array) -> None:
        """Count these rows."""
        self.rows += len(rows)
        self.difference += float(np.square(stored - rows, dtype=np.float64).sum())
        self.norm += float(np.square(rows, dtype=np.float64).sum())

    @property
    def relative(self) -> float:
        """0 for a tensor of zeros."""
        return (self.difference / self.norm) ** 0.5 if self.norm else 0.0


def pack(
    model: Model, plan: list[Planned], writer: BundleWriter, progress: Progress | None = None
) -> dict[str, StoredError]:
    """Store every tensor, a few megabytes at a time. Returns each tensor's error.

    Raises:
        CheckpointError: for a value that is not finite or too large for the codec, naming it.
    """
    blocks = packer() if any(codec.is_block for _, codec in plan) else numpy_packer
    done = 0
    errors: dict[str, StoredError] = {}
    for tensor, codec in plan:
        error = errors[tensor.name] = StoredError()
        for piece in model.pieces(tensor):
            data = _store(model, tensor, codec, piece, blocks)
            _compare(error, codec, piece, data)
            last = piece.start + len(piece.values) == tensor.matrix[0]
            tail = padding(matrix_bytes(codec, *tensor.matrix), ALIGNMENT) if last else data[:0]
            for part in (data, tail):
                if part.nbytes:
                    writer.write(tensor.name, part)
            done += data.nbytes + tail.nbytes
            if progress is not None:
                progress(done, writer.total_bytes)
    return errors


def _store(model: Model, tensor: Tensor, codec: Codec, piece: Piece, blocks: Packer) -> Array:
    """The piece's bytes in the codec."""
    if codec.is_block:
        try:
            return blocks(piece, codec)
        except InvalidRequest:
            _check(model, tensor, codec, piece)  # names the value of the checkpoint
            raise
    rows = _check(model, tensor, codec, piece)
    rows = rows.astype(np.float16 if codec is Codec.F16 else np.float32, copy=False)
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)


def _check(model: Model, tensor: Tensor, codec: Codec, piece: Piece) -> Array:
    """The piece in float32, if the codec can hold all of it."""
    rows = piece.widened()
    _refuse(model, tensor, piece, ~np.isfinite(rows), NOT_FINITE)
    if codec in LARGEST:
        _refuse(model, tensor, piece, np.abs(rows) > LARGEST[codec], f"{codec.value} {TOO_LARGE}")
    return rows


def _refuse(model: Model, tensor: Tensor, piece: Piece, bad: Array, why: str) -> None:
    if not bad.any():
        return
    row, column = (int(i) for i in np.argwhere(bad)[0])
    where = model.where(tensor, piece.expert, piece.start + row, column)
    value = piece.widened()[row, column]
    raise CheckpointError(f"{where} is {value}, which {why}")


def _compare(error: StoredError, codec: Codec, piece: Piece, data: Array) -> None:
    """Add the first rows of the piece to the tensor's error."""
    rows = Piece(piece.expert, piece.start, piece.values[:ERROR_ROWS], piece.dtype).widened()
    n, k = rows.shape
    if codec.is_block:
        stored = dequantize(codec, data, n, k)
    else:
        stored = data.view(np.float32 if codec is Codec.F32 else np.float16).reshape(-1, k)[:n]
    error.add(stored.astype(np.float32, copy=False), rows)
