# SPDX-License-Identifier: Apache-2.0
"""attention_decode and attention_prefill against the reference, each other, and alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from kernels import (
    CUDA,
    DECODE,
    GPU,
    HOST_SETS,
    PAGE_TOKENS,
    PREFILL,
    SETS,
    Batch,
    Kernels,
    relative,
    same_bits,
    sparse,
)
from tolerances import ATTENTION, HALF_ATTENTION, LONG_ATTENTION

from edgecascade.backends import reference
from edgecascade.backends._lib import address
from edgecascade.blocks import kv_rows
from edgecascade.errors import InvalidRequest
from edgecascade.tensors import KvType

ISAS = SETS
SLOTS, MAX_PAGES = 4, 10


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    dtype: type = np.float32

    @property
    def kv_type(self) -> KvType:
        return KvType.of(np.dtype(self.dtype))

    @property
    def row(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


SHAPES = [
    Shape(4, 2, 16),
    Shape(32, 2, 64),
    Shape(3, 1, 5),
    Shape(5, 5, 24),
    Shape(1, 1, 1),
    Shape(4, 2, 16, np.float16),
    Shape(5, 1, 20, np.float16),
    Shape(4, 2, 16, np.int8),
    Shape(5, 1, 20, np.int8),
    Shape(3, 1, 5, np.int8),
]
HALVES = Shape(16, 1, 128, np.float16)


def bound(isa: str, shape: Shape) -> float:
    """Of a prompt: the tensor cores take halves."""
    halves = isa in (CUDA, GPU) and shape.dtype is not np.float32
    return HALF_ATTENTION if halves else ATTENTION


class Layer:
    """Pages that are all NaN until written, handed out in no slot's order."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.shape, self.rng = shape, rng
        self.pages = rng.permutation(SLOTS * MAX_PAGES).astype(np.int32).reshape(SLOTS, MAX_PAGES)
        items = shape.kv_type.row_items(shape.head_dim)
        size = (SLOTS * MAX_PAGES, 2, shape.kv_heads, PAGE_TOKENS, items)
        # Of all ones, a float is NaN, and so is the scale of an int8 row.
        self.kv = np.full(size, -1, np.int8) if shape.dtype is np.int8 else np.full(
            size, np.nan, shape.dtype
        )  # fmt: skip

    def rows(self, tokens: int) -> Any:
        return 1.5 * self.rng.standard_normal((tokens, self.shape.row)).astype(np.float32)

    def run(self, kernels: Kernels, phase: int, batch: Batch, rows: Any, **changes: Any) -> Any:
        shape = self.shape
        y = np.full((batch.tokens, shape.heads * shape.head_dim), np.nan, np.float32)
        fields = {
            "kv": self.kv,
            "kv_type": shape.kv_type.ec_type,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "scale": 0.3,
        }
        batch = batch if batch.pages is not None else replace(batch, pages=self.pages)
        kernels.run("attention", phase, batch, qkv=rows, y=y, **{**fields, **changes})
        return y

    def reference(self, rows: Any) -> Any:
        """y of a sequence from its first token on."""
        shape = self.shape
        sizes = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
        items = shape.kv_type.row_items(shape.head_dim)
        state = {"kv": np.zeros((2, 0, shape.kv_heads, items), shape.dtype)}
        return reference.attention({**sizes, "scale": 0.3, "qkv": rows}, state)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 37, 127, 128, 129, 500])
def test_prefill_is_the_reference(isa: str, shape: Shape, tokens: int) -> None:
    layer = Layer(shape, seed=tokens)
    rows = layer.rows(tokens)
    got = layer.run(Kernels(isa), PREFILL, Batch([tokens], [2], [0]), rows)
    assert relative(got, layer.reference(rows)) <= bound(isa, shape)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("shape", "past", "tokens"),
    [
        (HALVES, 0, PAGE_TOKENS + 1),
        (HALVES, PAGE_TOKENS - 1, 2),
        (HALVES, 100, 29),
        (Shape(24, 1, 72, np.float16), 5, 70),
        (Shape(10, 2, 128, np.float16), 130, 9),
        (Shape(4, 4, 33, np.float16), 63, 66),
        (Shape(2, 1, 136, np.float16), 1, 20),
        (replace(HALVES, dtype=np.int8), 100, 29),
        (Shape(24, 1, 72, np.int8), 5, 70),
        (Shape(4, 4, 33, np.int8), 63, 66),
        (Shape(2, 1, 136, np.int8), 1, 20),
    ],
    ids=str,
)
def test_a_prompt_may_begin_anywhere_in_a_page(
    isa: str, shape: Shape, past: int, tokens: int
) -> None:
    layer, kernels = Layer(shape, seed=past), Kernels(isa)
    rows = layer.rows(past + tokens)
    if past:
        layer.run(kernels, PREFILL, Batch([past], [1], [0]), rows[:past])
    got = layer.run(kernels, PREFILL, Batch([tokens], [1], [past]), rows[past:])
    assert relative(got, layer.reference(rows)[past:]) <= bound(isa, shape)


@pytest.mark.parametrize("isa", ISAS)
def test_queries_of_any_magnitude(isa: str) -> None:
    """Beyond what a half holds, and below: the row's own scale. Keys bring the scores back."""
    layer = Layer(HALVES)
    rows = layer.rows(70)
    width = HALVES.heads * HALVES.head_dim
    size = np.float32(2.0) ** np.arange(-24, 46)
    rows[:, :width] *= size[:, None] / 2**10
    rows[:, width : width + HALVES.head_dim] /= 2**10
    got, want = layer.run(Kernels(isa), PREFILL, Batch([70], [0], [0]), rows), layer.reference(rows)
    assert np.isfinite(got).all()
    # Above the 25th power, scores of some 10^2 and more choose one key; which one may be a tie.
    assert relative(got[:46], want[:46]) <= bound(isa, HALVES) * 2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cut", [1, 63, 64, 255, 256, 300])
def test_pieces_and_steps_are_the_whole_prompt_bit_by_bit(isa: str, shape: Shape, cut: int) -> None:
    layer, kernels = Layer(shape), Kernels(isa)
    rows = layer.rows(320)
    want = layer.run(kernels, PREFILL, Batch([320], [0], [0]), rows)
    got = [layer.run(kernels, PREFILL, Batch([cut], [1], [0]), rows[:cut])]
    got.append(layer.run(kernels, PREFILL, Batch([317 - cut], [1], [cut]), rows[cut:317]))
    assert same_bits(np.concatenate(got), want[:317])
    steps = [
        layer.run(kernels, DECODE, Batch([1], [1], [t]), rows[t : t + 1]) for t in range(317, 320)
    ]
    if bound(isa, shape) == ATTENTION:
        assert same_bits(np.concatenate(steps), want[317:])
    else:
        assert relative(np.concatenate(steps), want[317:]) <= HALF_ATTENTION


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("phase", [DECODE, PREFILL])
def test_company_and_threads_do_not_change_a_sequence(isa: str, phase: int) -> None:
    """Bit by bit, and the pages of nobody keep their bytes."""
    past = [0, 70, 300, 255]
    lengths = [1] * 4 if phase == DECODE else [37, 1, 130, 3]
    batch = Batch(lengths, [3, 0, 1, 2], past)
    together, kernels = Layer(SHAPES[0]), Kernels(isa, threads=3)
    for slot, held in zip(batch.slots, past, strict=True):
        if held:
            together.run(kernels, PREFILL, Batch([held], [slot], [0]), together.rows(held))
    alone = Layer(SHAPES[0])
    alone.kv = together.kv.copy()
    rows = together.rows(batch.tokens)
    y = together.run(kernels, phase, batch, rows)
    single = Kernels(isa, threads=1)
    for s, slot in enumerate(batch.slots):
        mine = np.ascontiguousarray(rows[batch.rows(s)])
        one = Batch([lengths[s]], [slot], [past[s]])
        assert same_bits(alone.run(single, phase, one, mine), y[batch.rows(s)])
    assert same_bits(alone.kv, together.kv)
    written = sum(-(-(p + n) // PAGE_TOKENS) for p, n in zip(past, lengths, strict=True))
    assert np.isnan(together.kv).all(axis=(1, 2, 3, 4)).sum() == SLOTS * MAX_PAGES - written


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("phase", [DECODE, PREFILL])
def test_sequences_that_do_not_count_are_neither_read_nor_written(isa: str, phase: int) -> None:
    layer = Layer(SHAPES[0])
    lengths = [1, 1] if phase == DECODE else [70, 30]
    rows = layer.rows(sum(lengths))
    rows[lengths[0] :] = np.nan
    y = layer.run(Kernels(isa), phase, Batch(lengths, [1, 3], [0, 0], live=1), rows)
    assert relative(y[: lengths[0]], layer.reference(rows[: lengths[0]])) <= ATTENTION
    assert np.isnan(y[lengths[0] :]).all()
    assert np.isnan(layer.kv[layer.pages[3]]).all()


@pytest.mark.parametrize("isa", HOST_SETS)
@pytest.mark.parametrize("phase", [DECODE, PREFILL])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_a_page_behind_2_31_values_is_a_page(isa: str, phase: int, dtype: type) -> None:
    shape = Shape(4, 2, 16, dtype)
    layer, kernels, tokens = Layer(shape), Kernels(isa), 1 if phase == DECODE else 70
    rows = layer.rows(30 + tokens)
    layer.run(kernels, PREFILL, Batch([30], [1], [0]), rows[:30])
    pages = [2**31 // layer.kv[0].size + 1, 2**31 // layer.kv[0].size + 3]
    kv = sparse((pages[1] + 1, *layer.kv[0].shape), dtype)
    kv[pages] = layer.kv[layer.pages[1, :2]]
    batch = Batch([tokens], [0], [30], pages=np.array([pages], np.int32))
    got = layer.run(kernels, phase, batch, rows[30:], kv=address(kv))
    assert same_bits(got, layer.run(kernels, phase, Batch([tokens], [1], [30]), rows[30:]))
    assert same_bits(kv[pages], layer.kv[layer.pages[1, :2]])


@pytest.mark.parametrize("isa", ISAS)
def test_a_context_of_262144_tokens(isa: str) -> None:
    """All pages are one, so that each of its positions counts 4,096 times, but for the last, to
    which the step writes while others read: it is a copy.
    """
    layer, kernels = Layer(Shape(2, 1, 16, np.float16)), Kernels(isa)
    rows = layer.rows(64)
    layer.run(kernels, PREFILL, Batch([63], [1], [0]), rows[:63])
    want = layer.run(kernels, DECODE, Batch([1], [1], [63]), rows[63:])
    table = np.full((1, 2**18 // PAGE_TOKENS), layer.pages[1, 0], np.int32)
    table[0, -1] = layer.pages[0, 0]
    layer.kv[table[0, -1]] = layer.kv[layer.pages[1, 0]]
    got = layer.run(kernels, DECODE, Batch([1], [0], [2**18 - 1], pages=table), rows[63:])
    assert relative(got, want) <= LONG_ATTENTION


@pytest.mark.parametrize("isa", ISAS)
def test_int8_pages_hold_the_references_codes_and_scales(isa: str) -> None:
    """Bit by bit, also of rows of zeros, of magnitudes that halves lack, and of no numbers."""
    shape = Shape(2, 2, 20, np.int8)
    layer, kernels = Layer(shape), Kernels(isa)
    rows = layer.rows(70)
    rows[3], rows[4, 1::7], rows[5, ::9], rows[6] = 0, 1e7, np.nan, rows[6] * 1e-6
    layer.run(kernels, PREFILL, Batch([69], [1], [0]), rows[:69])
    layer.run(kernels, DECODE, Batch([1], [1], [69]), rows[69:])
    new = rows[:, shape.heads * shape.head_dim :].reshape(70, 2, shape.kv_heads, shape.head_dim)
    want = kv_rows(new, KvType.INT8)
    pages = layer.kv[layer.pages[1, :2]].reshape(2, 2, shape.kv_heads, -1)
    codes, scales = np.split(pages, [PAGE_TOKENS * shape.head_dim], axis=-1)
    for position in range(70):
        page, at = divmod(position, PAGE_TOKENS)
        row = codes[page].reshape(2, shape.kv_heads, PAGE_TOKENS, -1)[:, :, at]
        assert same_bits(row.copy(), want[position, ..., :-2].copy())
        found, known = (
            np.ascontiguousarray(one).view(np.float16)
            for one in (scales[page].reshape(2, shape.kv_heads, PAGE_TOKENS, 2)[:, :, at],
                        want[position, ..., -2:])
        )  # fmt: skip
        np.testing.assert_array_equal(found, known)


@pytest.mark.parametrize("isa", ISAS)
def test_a_nan_stays_behind_the_tokens_before_it(isa: str) -> None:
    layer = Layer(Shape(2, 2, 16))
    rows = layer.rows(90)
    rows[70] = np.nan
    y = layer.run(Kernels(isa), PREFILL, Batch([90], [0], [0]), rows)
    assert np.isfinite(y[:70]).all()
    assert np.isnan(y[70:]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_large_scores_do_not_overflow(isa: str) -> None:
    layer = Layer(SHAPES[0])
    rows = 30 * layer.rows(80)
    got = layer.run(Kernels(isa), PREFILL, Batch([80], [0], [0]), rows)
    # Scores of some 10^4 carry an error of 10^-3 into exp, here as in NumPy.
    assert relative(got, layer.reference(rows)) <= 1e-2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"heads": 0}, "heads is 0"),
        ({"heads": 5}, "heads 5 is no multiple of kv_heads 2"),
        ({"head_dim": -8}, "head_dim is -8"),
        ({"kv_type": 16}, "kv_type is 16"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"kv": None}, "kv is NULL"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], sentence: str) -> None:
    layer = Layer(SHAPES[0])
    with pytest.raises(InvalidRequest, match=sentence):
        layer.run(Kernels(), PREFILL, Batch([2], [0], [0]), layer.rows(2), **change)


@pytest.mark.parametrize(
    ("phase", "batch", "sentence"),
    [
        (DECODE, Batch([1], [0], [640]), "sequence 0 reaches 641 tokens; max_pages 10 holds 640"),
        (PREFILL, Batch([3], [0], [638]), "sequence 0 reaches 641 tokens; max_pages 10 holds 640"),
        (DECODE, Batch([2], [0], [0]), "2 tokens; attention_prefill takes more than one"),
        (PREFILL, Batch([1, 1], [0, 0], [0, 0]), "sequences 0 and 1 both use slot 0"),
        (PREFILL, Batch([1], [1], [70]), r"page_table\[1\]\[1\] is -1, but slot 1 holds 71 tokens"),
    ],
)
def test_bad_steps_are_named(phase: int, batch: Batch, sentence: str) -> None:
    layer = Layer(SHAPES[0])
    layer.pages[1, 1] = -1
    with pytest.raises(InvalidRequest, match=sentence):
        layer.run(Kernels(), phase, batch, layer.rows(batch.tokens))
