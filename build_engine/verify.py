# SPDX-License-Identifier: Apache-2.0
"""Runs a few tokens through the checkpoint's own weights and through the packed ones, layer by
layer.

Both runs are the NumPy reference; weights are widened one matrix at a time, experts only where a
token goes, so that a 30B model is verified in less than 3 GB. Then the kernel library, where it is
built, runs the packed weights for real.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from build_engine.read import Model
from edgecascade.backends.base import Array, open_backend
from edgecascade.backends.reference import Evaluator, rms_norm
from edgecascade.blocks import dequantize
from edgecascade.bundle import Bundle
from edgecascade.errors import BackendUnavailable, BuildError
from edgecascade.tensors import BLOCK_ROWS, KvState, Role, Tensor, matrix_bytes

log = logging.getLogger(__name__)

TOKENS = 4
SEED = 20
CHUNK_ROWS = 4096  # of the embedding or the head that are widened at once

# Of the token where they agree best. Float kernels differ by summation order. Int8 kernels round
# activations as the reference does, but the last bit before rounding moves some codes by one, and
# in a deep model that sends a token to another expert now and then. A wrong kernel is off by 1.
FLOAT_LIMIT = 1e-3
KERNEL_LIMIT = 0.5


@dataclass(frozen=True)
class LayerError:
    """Residual stream behind one layer: relative Frobenius norm, and the worst token's."""

    layer: int
    relative: float
    worst_token: float


@dataclass(frozen=True)
class Checks:
    """What `compare` found. Relative errors are Frobenius norms of the difference over that of the
    reference.
    """

    tokens: list[int]
    layers: list[LayerError]
    logits_relative: float
    same_greedy_tokens: int
    kernels: str  # the instruction set that ran, or why none did
    kernels_relative: float | None

    def to_json(self) -> dict[str, Any]:
        """For report.json."""
        return asdict(self)


class Weight:
    """A matrix, or a stack of them, that is widened on demand."""

    is_block = False

    def rows(self, expert: int, start: int, stop: int) -> Array:
        """float32 rows [start, stop) of one matrix."""
        raise NotImplementedError

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def dense(self, expert: int = 0) -> Array:
        """float32 [n, k]."""
        return self.rows(expert, 0, self.tensor.matrix[0])


class CheckpointWeight(Weight):
    """Rows of the checkpoint."""

    def __init__(self, model: Model, tensor: Tensor) -> None:
        super().__init__(tensor)
        self._model = model

    def rows(self, expert: int, start: int, stop: int) -> Array:
        """See Weight."""
        return self._model.rows(self.tensor, expert, start, stop).widened()


class PackedWeight(Weight):
    """Rows of the bundle; `start` of a quantized matrix is a multiple of 32."""

    def __init__(self, bundle: Bundle, tensor: Tensor) -> None:
        super().__init__(tensor)
        self._bundle, self._stored = bundle, bundle.tensors[tensor.name]
        self.is_block = self._stored.codec.is_block

    def rows(self, expert: int, start: int, stop: int) -> Array:
        """See Weight."""
        stored = self._stored
        if not self.is_block:
            values = self._bundle.matrix(stored.name)
            matrix = values[expert] if len(stored.shape) == 3 else values
            return np.asarray(np.atleast_2d(matrix)[start:stop], np.float32)
        columns = stored.matrix[1]
        first = start // BLOCK_ROWS * BLOCK_ROWS
        data = self._bundle.map(stored.name)[expert * stored.stride :]
        data = data[matrix_bytes(stored.codec, first, columns) :]
        return dequantize(stored.codec, data, stop - first, columns)[start - first :]


class Run(Evaluator):
    """The reference with `Weight`s, the embedding and the head in pieces."""

    def _embed(self, f: Mapping[str, Any]) -> Array:
        return np.concatenate(
            [f["table"].rows(0, int(token), int(token) + 1) for token in self.tokens]
        )

    def _head(self, f: Mapping[str, Any]) -> Array:
        x, weight = rms_norm(f["x"], f["norm"]), f["w"]
        vocab = weight.tensor.matrix[0]
        chunks: list[Any] = [
            _Chunk(weight, start, min(start + CHUNK_ROWS, vocab))
            for start in range(0, vocab, CHUNK_ROWS)
        ]
        parts = [self._product(x, chunk) for chunk in chunks]
        return np.concatenate(parts, axis=1)


class _Chunk:
    """Some rows of a weight, as `Evaluator` expects a weight."""

    def __init__(self, weight: Weight, start: int, stop: int) -> None:
        self.is_block, self._weight, self._rows = weight.is_block, weight, (start, stop)

    def dense(self, expert: int = 0) -> Array:
        return self._weight.rows(expert, *self._rows)


def compare(model: Model, bundle: Bundle) -> Checks:
    """Compare the packed weights with the checkpoint's, and the kernels with the reference.

    Raises:
        BuildError: when the packed weights give no numbers, or the kernels compute something else.
    """
    vocab = model.config.vocab
    count = min(TOKENS, model.config.max_context)
    tokens = np.random.default_rng(SEED).integers(0, vocab, count, dtype=np.int32)
    expected, layers = _run(
        model, tokens, {t.name: CheckpointWeight(model, t) for t in model.tensors}
    )
    packed = {t.name: PackedWeight(bundle, t) for t in model.tensors}
    found, packed_layers = _run(model, tokens, packed)
    if not np.isfinite(found).all():
        raise BuildError(
            f"logits of the packed weights are not finite for tokens {tokens.tolist()}"
        )
    name, relative = _kernels(model, bundle, tokens, packed)
    return Checks(
        tokens=tokens.tolist(),
        layers=[
            LayerError(
                i,
                relative_error(b, a),
                max(relative_error(q, p) for p, q in zip(a, b, strict=True)),
            )
            for i, (a, b) in enumerate(zip(layers, packed_layers, strict=True))
        ],
        logits_relative=relative_error(found, expected),
        same_greedy_tokens=int((found.argmax(axis=1) == expected.argmax(axis=1)).sum()),
        kernels=name,
        kernels_relative=relative,
    )


def relative_error(found: Array, expected: Array) -> float:
    """|found - expected| / |expected|."""
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(found.astype(np.float64) - expected)) / norm if norm else 0.0


def _run(
    model: Model, tokens: Array, weights: Mapping[str, Weight], *, int8_activations: bool = False
) -> tuple[Array, list[Array]]:
    """Logits and the residual stream behind every layer."""
    ops = Run(tokens, _empty_states(model), int8_activations)
    # Vectors and the router are arrays to the ops, everything else is a weight.
    small = {
        name: weight.dense().reshape(weight.tensor.shape)
        for name, weight in weights.items()
        if weight.tensor.role in (Role.VECTOR, Role.ROUTER)
    }
    logits: Array = model.module.forward(ops, model.config, {**weights, **small})
    return logits, ops.residuals


def _empty_states(model: Model) -> dict[int, dict[str, Array]]:
    states: dict[int, dict[str, Array]] = {}
    for state in model.module.states(model.config):
        part = states.setdefault(state.layer, {})
        if isinstance(state, KvState):
            part["kv"] = np.zeros((2, 0, state.kv_heads, state.head_dim), np.float32)
        else:  # the reference keeps only the columns that the next token reads
            skipped = 1 if state.name == "conv" else 0
            part[state.name] = np.zeros((state.shape[0] - skipped, *state.shape[1:]), np.float32)
    return states


def _kernels(
    model: Model, bundle: Bundle, tokens: Array, packed: Mapping[str, Weight]
) -> tuple[str, float | None]:
    """Which kernels ran the packed weights, and how far their logits are from the reference's."""
    try:
        backend = open_backend("cpu", bundle, slots=1, max_context=len(tokens))
    except BackendUnavailable as error:
        log.warning("the kernels were not verified: %s", error)
        return f"not run: {error}", None
    try:
        found = backend.logits(tokens)
    finally:
        backend.close()
    expected, _ = _run(model, tokens, packed, int8_activations=True)
    best = min(relative_error(a, b) for a, b in zip(found, expected, strict=True))
    limit = KERNEL_LIMIT if any(weight.is_block for weight in packed.values()) else FLOAT_LIMIT
    if not best <= limit:
        raise BuildError(
            "the kernel library and the reference disagree on the packed weights: relative error "
            f"{best:.3g} on the "
            f"best of {len(tokens)} tokens, at most {limit} is expected; report this with "
            "the checkpoint's name"
        )
    return str(getattr(backend, "isa", "cpu")), relative_error(found, expected)
