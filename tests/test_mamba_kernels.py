# SPDX-License-Identifier: Apache-2.0
"""mamba_step and mamba_prefill against the reference, against each other, and on their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from kernels import (
    DECODE,
    HOST_SETS,
    PREFILL,
    SETS,
    Batch,
    Kernels,
    relative,
    same_bits,
    sparse,
)
from tolerances import SCAN

from edgecascade.backends import reference
from edgecascade.backends._lib import address
from edgecascade.errors import InvalidRequest

ISAS = SETS
SLOTS = 5


@dataclass(frozen=True)
class Shape:
    heads: int
    head_dim: int
    groups: int
    state: int
    kernel: int
    chunk: int = 128

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        return self.inner + 2 * self.groups * self.state


SHAPES = [
    Shape(4, 16, 2, 16, 4),
    Shape(3, 5, 1, 24, 2, chunk=7),
    Shape(2, 80, 2, 1, 8),
    Shape(1, 1, 1, 80, 3, chunk=1),
    Shape(2, 64, 1, 128, 4, chunk=64),
    Shape(1, 40, 1, 200, 4),
]


class Layer:
    """Random weights, and states of all slots in the kernels' layout."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)

        def normal(*size: int) -> Any:
            return rng.standard_normal(size).astype(np.float32)

        self.shape, self.normal = shape, normal
        self.weights = {
            "conv_weight": 0.4 * normal(shape.kernel, shape.channels),
            "conv_bias": 0.2 * normal(shape.channels),
            "a": -rng.uniform(0.1, 8, shape.heads).astype(np.float32),
            "d": normal(shape.heads),
            "dt_bias": 2 * normal(shape.heads),
        }
        self.sizes = {
            name: getattr(shape, name)
            for name in ("heads", "head_dim", "groups", "state", "kernel", "chunk")
        }
        self.conv = normal(SLOTS, shape.kernel, shape.channels)
        self.ssm = normal(SLOTS, shape.heads, shape.head_dim, shape.state)

    def rows(self, tokens: int) -> Any:
        return self.normal(tokens, self.shape.inner + self.shape.channels + self.shape.heads)

    def run(self, kernels: Kernels, phase: int, batch: Batch, rows: Any, **changes: Any) -> Any:
        y = np.full((batch.tokens, self.shape.inner), np.nan, np.float32)
        fields = {**self.weights, **self.sizes, "conv": self.conv, "ssm": self.ssm, **changes}
        kernels.run("mamba", phase, batch, zxbcdt=rows, y=y, **fields)
        return y

    def reference(self, slot: int, past: int, rows: Any) -> tuple[Any, Any]:
        """y and the SSM state after the rows, by the definition."""
        taps = self.shape.kernel
        ring = [self.conv[slot, (past - taps + 1 + j) % taps] for j in range(taps - 1)]
        state = {"conv": np.array(ring), "ssm": self.ssm[slot].copy()}
        y = reference.mamba({**self.weights, **self.sizes, "zxbcdt": rows}, state)
        return y, state["ssm"]

    def copy(self) -> Layer:
        twin = Layer(self.shape)
        twin.__dict__.update(self.__dict__)
        twin.conv, twin.ssm = self.conv.copy(), self.ssm.copy()
        return twin


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 37, 127, 128, 129, 500])
def test_prefill_is_the_reference(isa: str, shape: Shape, tokens: int) -> None:
    layer = Layer(shape, seed=tokens)
    rows = layer.rows(tokens)
    want, state = layer.reference(2, 9, rows)
    got = layer.run(Kernels(isa), PREFILL, Batch([tokens], [2], [9]), rows)
    assert relative(got, want) <= SCAN
    assert relative(layer.ssm[2], state) <= SCAN


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_are_the_reference(isa: str, shape: Shape) -> None:
    layer, kernels = Layer(shape), Kernels(isa)
    rows = layer.rows(20)
    want, state = layer.reference(1, 0, rows)
    got = [layer.run(kernels, DECODE, Batch([1], [1], [t]), rows[t : t + 1]) for t in range(20)]
    assert relative(np.concatenate(got), want) <= SCAN
    assert relative(layer.ssm[1], state) <= SCAN


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("power", [-30, 30])
def test_prompts_of_any_magnitude(isa: str, power: int) -> None:
    """x, B and C each far beyond what a half holds, their products still a float's."""
    layer = Layer(SHAPES[0])
    rows, inner = layer.rows(70), layer.shape.inner
    layer.weights["conv_bias"][:] = 0
    rows[:, inner : inner + layer.shape.channels] *= np.float32(2.0) ** power
    layer.conv *= np.float32(2.0) ** power
    layer.ssm *= np.float32(2.0) ** (2 * power)
    want, state = layer.reference(0, 4, rows)
    got = layer.run(Kernels(isa), PREFILL, Batch([70], [0], [4]), rows)
    assert relative(got, want) <= SCAN
    assert relative(layer.ssm[0], state) <= SCAN


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cut", [1, 2, 127, 128, 250])
def test_a_prompt_in_pieces_and_steps_is_the_whole_prompt(isa: str, cut: int) -> None:
    whole, kernels = Layer(SHAPES[0]), Kernels(isa)
    pieces = whole.copy()
    rows = whole.rows(300)
    want = whole.run(kernels, PREFILL, Batch([300], [3], [0]), rows)
    got = [pieces.run(kernels, PREFILL, Batch([cut], [3], [0]), rows[:cut])]
    got.append(pieces.run(kernels, PREFILL, Batch([290 - cut], [3], [cut]), rows[cut:290]))
    for t in range(290, 300):
        got.append(pieces.run(kernels, DECODE, Batch([1], [3], [t]), rows[t : t + 1]))
    assert relative(np.concatenate(got), want) <= SCAN
    assert relative(pieces.ssm, whole.ssm) <= SCAN
    assert same_bits(pieces.conv, whole.conv)


@pytest.mark.parametrize("chunk", [1, 5, 32, 100, 256, 10_000])
def test_the_chunk_does_not_change_the_result(chunk: int) -> None:
    layer = Layer(SHAPES[4])
    other = layer.copy()
    other.sizes = {**layer.sizes, "chunk": chunk}
    rows, batch, kernels = layer.rows(333), Batch([333], [0], [5]), Kernels()
    want, got = (one.run(kernels, PREFILL, batch, rows) for one in (layer, other))
    assert relative(got, want) <= SCAN
    assert relative(other.ssm, layer.ssm) <= SCAN


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("phase", [DECODE, PREFILL])
def test_company_and_threads_do_not_change_a_sequence(isa: str, phase: int) -> None:
    """Bit by bit, and the slots of nobody keep their bytes."""
    lengths = [1] * 4 if phase == DECODE else [37, 1, 130, 3]
    batch = Batch(lengths, [4, 0, 3, 1], [0, 7, 2, 100])
    together = Layer(SHAPES[0])
    alone = together.copy()
    rows = together.rows(batch.tokens)
    y = together.run(Kernels(isa, threads=3), phase, batch, rows)
    kernels = Kernels(isa, threads=1)
    for s, (slot, past) in enumerate(zip(batch.slots, batch.past, strict=True)):
        one = Batch([lengths[s]], [slot], [past])
        mine = np.ascontiguousarray(rows[batch.rows(s)])
        assert same_bits(alone.run(kernels, phase, one, mine), y[batch.rows(s)])
    assert same_bits(alone.ssm, together.ssm)
    assert same_bits(alone.conv, together.conv)
    assert same_bits(together.ssm[2], Layer(SHAPES[0]).ssm[2])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("phase", [DECODE, PREFILL])
def test_what_does_not_count_is_neither_read_nor_written(isa: str, phase: int) -> None:
    layer = Layer(SHAPES[0])
    lengths = [1, 1] if phase == DECODE else [20, 30]
    batch = Batch(lengths, [1, 4], [3, 3])
    rows = layer.rows(batch.tokens)
    rows[lengths[0] :] = np.nan
    layer.ssm[[0, 2, 3, 4]] = layer.conv[[0, 2, 3, 4]] = np.nan
    want, _ = layer.reference(1, 3, rows[: lengths[0]])
    y = layer.run(Kernels(isa), phase, replace(batch, live=1), rows)
    assert relative(y[: lengths[0]], want) <= SCAN
    assert np.isnan(y[lengths[0] :]).all()
    assert np.isfinite(layer.ssm[1]).all()
    assert np.isnan(layer.ssm[[0, 2, 3, 4]]).all()


@pytest.mark.parametrize("isa", HOST_SETS)
@pytest.mark.parametrize("phase", [DECODE, PREFILL])
@pytest.mark.parametrize("shape", [Shape(8, 32, 1, 64, 4), Shape(64, 1, 64, 1, 8)], ids=str)
def test_a_slot_behind_2_31_values_is_a_slot(isa: str, phase: int, shape: Shape) -> None:
    """Of the state there, of the convolution's inputs here."""
    layer, kernels = Layer(shape), Kernels(isa)
    of_slot = {"ssm": layer.ssm[1], "conv": layer.conv[1]}
    far = 2**31 // max(part.size for part in of_slot.values()) + 1
    pools = {name: sparse((far + 1, *part.shape), part.dtype) for name, part in of_slot.items()}
    for name, part in of_slot.items():
        pools[name][far] = part
    tokens = 1 if phase == DECODE else 40
    rows = layer.rows(tokens)
    places = {name: address(pool) for name, pool in pools.items()}
    got = layer.run(kernels, phase, Batch([tokens], [far], [5]), rows, **places)
    assert same_bits(got, layer.run(kernels, phase, Batch([tokens], [1], [5]), rows))
    for name, part in of_slot.items():
        assert same_bits(pools[name][far], part)


@pytest.mark.parametrize("isa", ISAS)
def test_a_nan_stays_behind_the_tokens_before_it(isa: str) -> None:
    layer = Layer(SHAPES[0])
    rows = layer.rows(40)
    rows[30] = np.nan
    y = layer.run(Kernels(isa), PREFILL, Batch([40], [0], [0]), rows)
    assert np.isfinite(y[:30]).all()
    assert np.isnan(y[30:]).any()


@pytest.mark.parametrize("isa", ISAS)
def test_a_huge_dt_forgets_and_does_not_overflow(isa: str) -> None:
    layer = Layer(SHAPES[0])
    rows = layer.rows(150)
    rows[::7, -layer.shape.heads :] = 3e4
    rows[3::7, -layer.shape.heads :] = -60
    want, state = layer.reference(0, 0, rows)
    y = layer.run(Kernels(isa), PREFILL, Batch([150], [0], [0]), rows)
    assert relative(y, want) <= SCAN
    assert relative(layer.ssm[0], state) <= SCAN


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kernel": 1}, "kernel is 1, must be 2 to 8"),
        ({"kernel": 9}, "kernel is 9, must be 2 to 8"),
        ({"heads": 0}, "heads is 0"),
        ({"groups": 3}, "heads 4 is no multiple of groups 3"),
        ({"state": -1}, "state is -1"),
        ({"chunk": 0}, "chunk is 0"),
        ({"ssm": None}, "ssm is NULL"),
        ({"heads": 2**20, "head_dim": 2**20}, "rows would have"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], sentence: str) -> None:
    layer = Layer(SHAPES[0])
    with pytest.raises(InvalidRequest, match=sentence):
        layer.run(Kernels(), PREFILL, Batch([2], [0], [0]), layer.rows(2), **change)


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        (Batch([1, 1], [2, 2], [0, 0]), "sequences 0 and 1 both use slot 2"),
        (Batch([1], [-1], [0]), r"slot\[0\] is -1"),
        (Batch([1], [0], [-4]), r"past\[0\] is -4"),
        (Batch([2], [0], [0]), "sequence 0 has 2 tokens; mamba_prefill takes more than one"),
    ],
)
def test_bad_steps_are_named(batch: Batch, sentence: str) -> None:
    layer = Layer(SHAPES[0])
    with pytest.raises(InvalidRequest, match=sentence):
        layer.run(Kernels(), DECODE, batch, layer.rows(batch.tokens))
