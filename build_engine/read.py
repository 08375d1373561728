# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as the bundle's tensors, row by row: which arrays it must have, and how they become
ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build_engine.checkpoint import DTYPES, Checkpoint, SourceTensor, listed
from edgecascade.errors import CheckpointError
from edgecascade.models import family
from edgecascade.tensors import BLOCK_ROWS, Tensor, Transform, round_up

PIECE_BYTES = 32 << 20  # of source values held at once


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one matrix of a tensor; `dtype` is "f32", "f16", or "bf16" in uint16."""

    expert: int
    start: int
    values: NDArray[Any]  # [rows, columns]
    dtype: str

    def widened(self) -> NDArray[np.float32]:
        """The rows in float32, exactly."""
        return widen(self.values, self.dtype)


def widen(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """float32 from "f32", "f16" or "bf16", exactly."""
    if dtype == "bf16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Model:
    """A checkpoint whose tensors are all there, with the shapes its config asks for."""

    checkpoint: Checkpoint
    module: ModuleType
    family: str
    config: Any
    tensors: list[Tensor]

    def sources(self, tensor: Tensor) -> list[SourceTensor]:
        """Where its values come from."""
        found = self.checkpoint.tensors
        return [found[name] for name, _ in _wanted(tensor, found)]

    def pieces(self, tensor: Tensor) -> Iterator[Piece]:
        """All rows in order, a few megabytes at a time; every piece but a matrix's last is whole
        blocks.
        """
        rows, columns = tensor.matrix
        step = max(BLOCK_ROWS, PIECE_BYTES // (4 * columns) // BLOCK_ROWS * BLOCK_ROWS)
        for expert in range(tensor.experts):
            for start in range(0, rows, step):
                yield self.rows(tensor, expert, start, min(start + step, rows))

    def rows(self, tensor: Tensor, expert: int, start: int, stop: int) -> Piece:
        """Rows [start, stop) of one matrix."""
        sources = self.sources(tensor)
        if tensor.transform in (Transform.CONV, Transform.NEG_EXP):
            return Piece(expert, start, self._transformed(tensor)[start:stop], "f32")
        if tensor.transform is Transform.EXPERTS:
            fused = len(sources[0].shape) == 3
            offset = expert * tensor.matrix[0] if fused else 0
            source = sources[0 if fused else expert]
            parts = [(self.checkpoint.read(source, offset + start, offset + stop), source.dtype)]
        else:
            parts = list(self._stacked(sources, start, stop))
        return _joined(expert, start, parts)

    def where(self, tensor: Tensor, expert: int, row: int, column: int) -> str:
        """The checkpoint's own name and index of a value, for messages."""
        sources = self.sources(tensor)
        if tensor.transform is Transform.CONV:
            return f"{sources[0].name}[{column}, 0, {row}]"
        if tensor.transform is Transform.EXPERTS:
            fused = len(sources[0].shape) == 3
            return (
                f"{sources[0].name}[{expert}, {row}, {column}]"
                if fused
                else f"{sources[expert].name}[{row}, {column}]"
            )
        for source in sources:
            if row < source.shape[0] or len(source.shape) == 1:
                break
            row -= source.shape[0]
        return (
            f"{source.name}[{column}]"
            if len(source.shape) == 1
            else f"{source.name}[{row}, {column}]"
        )

    def _stacked(
        self, sources: list[SourceTensor], start: int, stop: int
    ) -> Iterator[tuple[NDArray[Any], str]]:
        first = 0
        for source in sources:
            rows = source.shape[0] if len(source.shape) > 1 else 1
            begin, end = max(start - first, 0), min(stop - first, rows)
            if begin < end:
                yield self.checkpoint.read(source, begin, end), source.dtype
            first += rows

    def _transformed(self, tensor: Tensor) -> NDArray[np.float32]:
        (source,) = self.sources(tensor)
        rows = source.shape[0] if len(source.shape) > 1 else 1
        values = widen(self.checkpoint.read(source, 0, rows), source.dtype.lower())
        if tensor.transform is Transform.CONV:
            return np.ascontiguousarray(values.T)
        with np.errstate(over="ignore"):  # what becomes infinite is refused when it is packed
            minus_exp = (-np.exp(values.astype(np.float64))).astype(np.float32)
        return np.where(np.isfinite(values), minus_exp, values)  # -inf would become a fine 0


def read(folder: str | Path) -> Model:
    """Open a checkpoint and check that it is complete.

    Raises:
        UnsupportedModel: for a family, a config or a quantization that this version does not
        implement.
        CheckpointError: for a damaged folder, and for missing, unknown or misshapen tensors, naming
        them.
    """
    checkpoint = Checkpoint(folder)
    model_type = checkpoint.config.get("model_type")
    module = family(model_type)
    config = module.read_config(checkpoint.config)
    model = Model(checkpoint, module, str(model_type), config, module.tensors(config))
    _check(model)
    return model


def _wanted(
    tensor: Tensor, found: Mapping[str, SourceTensor]
) -> Sequence[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what a tensor is read from."""
    replaced = tensor.sources[0][0] not in found
    if replaced and tensor.instead is not None and tensor.instead[0] in found:
        return [tensor.instead]
    return tensor.sources


def _check(model: Model) -> None:
    found = model.checkpoint.tensors
    problems: list[str] = []
    used: set[str] = set()
    for tensor in model.tensors:
        needed = _wanted(tensor, found)
        used.update(name for name, _ in needed)
        for name, shape in needed:
            source = found.get(name)
            if source is None:
                problems.append(f"{name} is missing")
            elif source.shape != shape:
                problems.append(
                    f"{source.name} has shape {list(source.shape)}, the config asks for "
                    f"{list(shape)}"
                )
            elif source.dtype not in DTYPES:
                problems.append(f"{source.name} is {source.dtype}; BF16, F16 and F32 are read")
    unknown = found.keys() - used
    problems += [f"{found[name].name} is unknown" for name in unknown]
    if problems:
        raise CheckpointError(
            f"checkpoint {model.checkpoint.folder} does not fit its config.json: {listed(problems)}"
        )


def _joined(expert: int, start: int, parts: list[tuple[NDArray[Any], str]]) -> Piece:
    if len(parts) == 1:
        values, dtype = parts[0]
        return Piece(expert, start, values, dtype.lower())
    if len({dtype for _, dtype in parts}) == 1:
        return Piece(
            expert, start, np.concatenate([values for values, _ in parts]), parts[0][1].lower()
        )
    return Piece(
        expert, start, np.concatenate([widen(v, dtype.lower()) for v, dtype in parts]), "f32"
    )


def padding(size: int, alignment: int) -> NDArray[np.uint8]:
    """Zero bytes up to the next multiple of `alignment`."""
    return np.zeros(round_up(size, alignment) - size, np.uint8)
