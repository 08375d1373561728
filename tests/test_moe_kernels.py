# SPDX-License-Identifier: Apache-2.0
"""moe: choice, weights and sum of the experts; a token's bits do not depend on its batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tolerances
from kernels import PREFILL, SETS, Batch, Kernels, relative, same_bits
from numpy.typing import NDArray
from weights import Matrices, matrices

from edgecascade.backends._lib import cpu_isas
from edgecascade.backends.reference import rms_norm, route
from edgecascade.errors import InvalidRequest
from edgecascade.ops import Norm
from edgecascade.tensors import Codec

Floats = NDArray[np.float32]
U4, I8, F32, F16 = Codec.U4_64, Codec.I8_64, Codec.F32, Codec.F16


@dataclass(frozen=True)
class Layer:
    """One mixture of experts."""

    up: Matrices
    down: Matrices
    shared: tuple[Matrices, Matrices] | None
    router: Floats
    bias: Floats
    norm: Norm
    routing: dict[str, Any]

    @property
    def fields(self) -> dict[str, Any]:
        shared = (
            {"shared_up": self.shared[0].weight, "shared_down": self.shared[1].weight}
            if self.shared
            else {}
        )
        return {"up": self.up.weight, "down": self.down.weight, **shared, **self.choice}

    @property
    def choice(self) -> dict[str, Any]:
        return {"router": self.router, "bias": self.bias, "norm": self.norm, **self.routing}


@dataclass(frozen=True)
class Shape:
    """Sizes, codecs of up, down, shared up and shared down, and the routing."""

    d: int = 64
    ff: int = 64
    shared: int = 128
    experts: int = 8
    codecs: tuple[Codec, Codec, Codec, Codec] = (U4, U4, U4, U4)
    top_k: int = 2
    n_group: int = 1
    topk_group: int = 1
    normalize: int = 1


SHAPES = [
    Shape(),
    Shape(100, 72, 130, 16, (U4, I8, I8, U4), top_k=6, n_group=4, topk_group=2),
    Shape(96, 33, 0, 8, (F32, F32, F32, F32), top_k=3, n_group=2),
    Shape(96, 40, 50, 6, (F16, U4, F32, I8), top_k=6),
    Shape(130, 65, 64, 5, (U4, F16, U4, U4), top_k=1, n_group=5, topk_group=2, normalize=0),
    Shape(64, 128, 64, 128, (U4, U4, I8, I8), top_k=6),
    Shape(300, 1290, 1500, 8, (U4, U4, U4, U4), top_k=3),  # more than CUDA's kernels hold at once
]


def layer(kernels: Kernels, shape: Shape) -> Layer:
    random = np.random.default_rng(11)
    up, down, shared_up, shared_down = shape.codecs
    shared = None
    if shape.shared:
        shared = (
            matrices(kernels, shared_up, shape.shared, shape.d, seed=3),
            matrices(kernels, shared_down, shape.d, shape.shared, seed=4),
        )
    return Layer(
        up=matrices(kernels, up, shape.ff, shape.d, experts=shape.experts, seed=1),
        down=matrices(kernels, down, shape.d, shape.ff, experts=shape.experts, seed=2),
        shared=shared,
        router=(random.standard_normal((shape.experts, shape.d)) * 0.3).astype(np.float32),
        bias=(random.standard_normal(shape.experts) * 0.1).astype(np.float32),
        norm=Norm(random.standard_normal(shape.d).astype(np.float32), 1e-5),
        routing={
            "top_k": shape.top_k,
            "n_group": shape.n_group,
            "topk_group": shape.topk_group,
            "normalize": shape.normalize,
            "scale": 2.5,
        },
    )


@dataclass(frozen=True)
class Result:
    y: Floats
    ids: NDArray[np.int32]
    weights: Floats


def moe(
    kernels: Kernels,
    m: Layer,
    x: Floats,
    forced: tuple[Any, Any] | None = None,
    live: int | None = None,
    **changes: Any,
) -> Result:
    """One call, in place."""
    y, tokens, top_k = x.copy(), len(x), m.routing["top_k"]
    ids = np.full((tokens, top_k), -7, np.int32)
    weights = np.full((tokens, top_k), np.nan, np.float32)
    if forced is not None:
        ids[:], weights[:] = forced
    batch = Batch([1] * tokens, range(tokens), [0] * tokens, live=live)
    fields = m.fields | {"ids": ids, "weights": weights, "force": int(forced is not None)}
    kernels.run("moe", PREFILL, batch, x=y, y=y, **fields | changes)
    return Result(y, ids, weights)


def increment(m: Layer, x: Floats, ids: Any, weights: Any) -> NDArray[np.float64]:
    """y - x in float64, with the rounding of activations that the codecs bring."""
    h, y = rms_norm(x, m.norm), np.zeros(x.shape)

    def hidden(product: Any) -> Any:
        return np.square(np.maximum(product, 0))

    for expert in np.unique(ids):
        token, choice = np.nonzero(ids == expert)
        up = hidden(m.up.product(h[token], expert))
        y[token] += weights[token, choice][:, None] * m.down.product(up, expert)
    if m.shared:
        y += m.shared[1].product(hidden(m.shared[0].product(h)))
    return y


def rows(tokens: int, columns: int) -> Floats:
    return np.random.default_rng([tokens, columns]).standard_normal((tokens, columns), np.float32)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 9, 129])
def test_moe_is_the_definition(isa: str, shape: Shape, tokens: int) -> None:
    kernels = Kernels(isa)
    m, x = layer(kernels, shape), rows(tokens, shape.d)
    got = moe(kernels, m, x)
    ids, weights = route(m.choice, rms_norm(x, m.norm))
    assert np.array_equal(got.ids, ids)
    assert np.allclose(got.weights, weights, rtol=tolerances.ROUTER_WEIGHTS, atol=0)
    want = increment(m, x, ids, weights)
    assert relative(got.y - x, want) <= tolerances.ROUNDED_ACTIVATIONS


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("tokens", [9, 16, 17, 64, 65, 150, 300])
def test_experts_with_all_tokens_a_few_and_none(isa: str, tokens: int) -> None:
    """Those without have weights that are NaN. Other places in the prompt give the same bits.

    With more than 512 pairs of token and expert, each of CUDA's warps sorts several times.
    """
    kernels = Kernels(isa)
    m, x = layer(kernels, Shape(72, 136, 130)), rows(tokens, 72)
    ids = np.array([[2 if t % 7 == 3 else 4, 5] for t in range(tokens)], np.int32)
    weights = 0.1 + np.random.default_rng(tokens).random((tokens, 2)).astype(np.float32)
    for matrix in (m.up, m.down):
        stride = matrix.weight.expert_stride
        for expert in {0, 1, 3, 6, 7}:
            matrix.data[expert * stride : (expert + 1) * stride] = 255
        matrix.weight.data = kernels.place(matrix.data)
    got = moe(kernels, m, x, (ids, weights))
    assert relative(got.y - x, increment(m, x, ids, weights)) <= tolerances.ROUNDED_ACTIVATIONS
    order = np.random.default_rng(0).permutation(tokens)
    again = moe(kernels, m, x[order], (ids[order], weights[order]))
    assert same_bits(again.y, got.y[order])


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("shape", [*SHAPES[:4], SHAPES[-1]], ids=str)
def test_a_token_has_the_same_bits_in_any_batch(isa: str, shape: Shape) -> None:
    kernels = Kernels(isa)
    m, x = layer(kernels, shape), rows(min(37, kernels.same_bits_rows), shape.d)
    together = moe(kernels, m, x)
    for t in (0, len(x) // 2, len(x) - 1):
        alone = moe(kernels, m, x[t : t + 1])
        assert same_bits(alone.y[0], together.y[t])
        assert same_bits(alone.weights[0], together.weights[t])


@pytest.mark.parametrize("isa", [*cpu_isas()[1:], "amx-emulated"])
def test_every_isa_gives_the_bits_of_portable_for_forced_experts(isa: str) -> None:
    if isa == "amx-emulated" and "avx512vnni" not in cpu_isas():
        isa = "portable"
    portable, other = Kernels("portable"), Kernels(isa)
    m = layer(portable, SHAPES[1])
    for tokens in (1, 9, 100):
        x = rows(tokens, 100)
        chosen = moe(portable, m, x)
        forced = (chosen.ids, chosen.weights)
        assert same_bits(moe(portable, m, x, forced).y, moe(other, m, x, forced).y)


def test_the_number_of_threads_changes_nothing() -> None:
    one, three = Kernels(threads=1), Kernels(threads=3)
    m, x = layer(one, SHAPES[5]), rows(70, 64)
    assert same_bits(moe(one, m, x).y, moe(three, m, x).y)


def test_experts_without_tokens_are_skipped() -> None:
    """All tokens choose the same experts; the weights of the others are NaN."""
    kernels = Kernels()
    m = layer(kernels, Shape(codecs=(F32, F32, F32, F32)))
    x = np.repeat(rows(1, 64), 20, axis=0)
    ids = moe(kernels, m, x).ids
    stride = m.up.weight.expert_stride
    for expert in set(range(8)) - set(ids[0].tolist()):
        for matrix in (m.up, m.down):
            matrix.data[expert * stride : expert * stride + 64 * 64 * 4] = 255
    assert np.isfinite(moe(kernels, m, x).y).all()


def test_ties_go_to_the_lower_expert() -> None:
    kernels = Kernels()
    m = layer(kernels, Shape(top_k=3))
    m.router[:], m.bias[:] = 0, 0
    assert moe(kernels, m, rows(3, 64)).ids.tolist() == [[0, 1, 2]] * 3


def test_groups_that_tie_go_to_the_lower_group() -> None:
    kernels = Kernels()
    m = layer(kernels, Shape(top_k=2, n_group=4, topk_group=2))
    m.router[:], m.bias[:] = 0, [0, 0, 9, 9, 0, 0, 9, 9]
    assert moe(kernels, m, rows(1, 64)).ids.tolist() == [[2, 3]]
    m.bias[:] = 0
    assert moe(kernels, m, rows(1, 64)).ids.tolist() == [[0, 1]]


@pytest.mark.parametrize("isa", SETS)
def test_a_bad_token_stays_alone(isa: str) -> None:
    kernels = Kernels(isa)
    m, x = layer(kernels, Shape(top_k=3)), rows(5, 64)
    clean = moe(kernels, m, x)
    x[2, 5], x[3, 1] = np.nan, np.inf
    got = moe(kernels, m, x)
    assert ((got.ids >= 0) & (got.ids < 8)).all()
    assert np.isnan(got.y[2]).all()
    assert same_bits(got.y[[0, 1, 4]], clean.y[[0, 1, 4]])


def test_rows_that_do_not_count_are_neither_read_nor_written() -> None:
    kernels = Kernels()
    m, x = layer(kernels, SHAPES[1]), rows(5, 100)
    x[3:] = np.nan
    got = moe(kernels, m, x, live=3)
    assert same_bits(got.y[:3], moe(kernels, m, x[:3].copy()).y)
    assert np.isnan(got.y[3:]).all()
    assert (got.ids[3:] == -7).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, r"top_k is 9, outside 1..8 experts"),
        ({"top_k": 0}, r"top_k is 0"),
        ({"n_group": 3}, r"n_group is 3, which does not divide 8 experts"),
        ({"n_group": 2, "topk_group": 3}, r"topk_group is 3, outside 1..n_group = 2"),
        ({"n_group": 8, "topk_group": 1}, r"top_k is 2, but 1 groups of 1 experts hold fewer"),
        ({"shared_up": None}, r"shared_up and shared_down must be both there or both absent"),
    ],
)
def test_a_bad_choice_is_refused(changes: dict[str, Any], message: str) -> None:
    kernels = Kernels()
    m, x = layer(kernels, Shape()), rows(1, 64)
    if "shared_up" in changes:
        changes = {"shared_up": type(m.up.weight)()}
    with pytest.raises(InvalidRequest, match=message):
        moe(kernels, m, x, **changes)


def test_a_forced_expert_that_does_not_exist_is_refused() -> None:
    kernels = Kernels()
    m, x = layer(kernels, Shape()), rows(2, 64)
    with pytest.raises(InvalidRequest, match=r"forced ids\[1\]\[0\] is 8, outside 0..7"):
        moe(kernels, m, x, forced=([[0, 1], [8, 1]], 0.5))
