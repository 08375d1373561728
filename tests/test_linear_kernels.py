# SPDX-License-Identifier: Apache-2.0
"""linear and head: every codec on every ISA, the same bits in any batch, refusals by message."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import tolerances
from kernels import PREFILL, SETS, Batch, Kernels, relative, same_bits
from numpy.typing import NDArray
from weights import Matrices, matrices

from edgecascade.backends._lib import ARGS, Step, Weight, address, cpu_isas
from edgecascade.backends.reference import rms_norm
from edgecascade.errors import BackendError, InvalidRequest
from edgecascade.ops import Activation, Norm
from edgecascade.tensors import Codec

Floats = NDArray[np.float32]
BLOCKS = [Codec.U4_64, Codec.I8_64]
FASTER = cpu_isas()[1:]  # than portable
SHAPES = [(32, 64), (1, 1), (33, 65), (100, 200), (7, 130), (96, 300)]


@pytest.fixture(scope="module", params=SETS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(request.param)


def rows(tokens: int, columns: int, seed: int = 1) -> Floats:
    """Rows of very different magnitudes."""
    random = np.random.default_rng([seed, tokens, columns])
    size = np.exp(3 * random.standard_normal((tokens, 1)))
    return (size * random.standard_normal((tokens, columns))).astype(np.float32)


def bound(kernels: Kernels, codec: Codec, tokens: int = 1) -> float:
    if not codec.is_block:
        return tolerances.FLOAT_PRODUCT
    stored = kernels.cuda and tokens <= kernels.same_bits_rows
    return tolerances.STORED_CODES if stored else tolerances.BLOCK_PRODUCT


def linear(kernels: Kernels, x: Floats, w: Matrices, **fields: Any) -> Floats:
    y = np.full((len(x), w.weight.n), np.nan, np.float32)
    live = fields.pop("live", None)
    lengths = [1] * len(x)
    batch = Batch(lengths, range(len(x)), lengths, live=live)
    kernels.run("linear", PREFILL, batch, x=x, w=w.weight, y=y, **fields)
    return y


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_product_is_exact(kernels: Kernels, codec: Codec, n: int, k: int) -> None:
    w = matrices(kernels, codec, n, k)
    for tokens in (1, 2, 3, 8, 9, 17, 37, 129):
        x = rows(tokens, k)
        got = linear(kernels, x, w)
        assert relative(got, w.product(x)) <= bound(kernels, codec, tokens), tokens


@pytest.mark.parametrize("codec", BLOCKS)
@pytest.mark.parametrize("isa", [*FASTER, *(["amx-emulated"] if "avx512vnni" in FASTER else [])])
def test_every_isa_gives_the_bits_of_portable(isa: str, codec: Codec) -> None:
    portable, other = Kernels("portable"), Kernels(isa)
    for n, k in SHAPES:
        w = matrices(portable, codec, n, k)
        gamma = rows(1, k, seed=3)[0]
        for tokens in (1, 5, 16, 40, 200):
            x = rows(tokens, k)
            fields = {"norm": Norm(gamma, 1e-5), "act": Activation.RELU2}
            assert same_bits(linear(portable, x, w, **fields), linear(other, x, w, **fields))


@pytest.mark.parametrize("codec", list(Codec))
def test_a_row_has_the_same_bits_in_any_batch(kernels: Kernels, codec: Codec) -> None:
    w = matrices(kernels, codec, 70, 150)
    for tokens in (8, min(37, kernels.same_bits_rows)):
        x = rows(tokens, 150)
        together = linear(kernels, x, w)
        alone = np.concatenate([linear(kernels, x[t : t + 1], w) for t in range(tokens)])
        assert same_bits(together, alone)


@pytest.mark.parametrize("codec", [Codec.F32, Codec.U4_64])
def test_the_number_of_threads_changes_nothing(codec: Codec) -> None:
    one, three = Kernels(threads=1), Kernels(threads=3)
    w, x = matrices(one, codec, 300, 200), rows(40, 200)
    assert same_bits(linear(one, x, w), linear(three, x, w))


@pytest.mark.parametrize("codec", list(Codec))
def test_norm_activation_and_residual(kernels: Kernels, codec: Codec) -> None:
    w, x = matrices(kernels, codec, 50, 120), rows(9, 120)
    norm = Norm(rows(1, 120, seed=2)[0], 1e-5, 4)
    residual = np.random.default_rng(5).standard_normal((9, 50)).astype(np.float32)
    product = w.product(rms_norm(x, norm))
    want = np.square(np.maximum(product, 0)) + residual
    y = residual.copy()  # in place
    fields = {"norm": norm, "residual": y, "act": Activation.RELU2}
    batch = Batch([9], [0], [0])
    kernels.run("linear", PREFILL, batch, x=x, w=w.weight, y=y, **fields)
    assert relative(y, want) <= tolerances.ROUNDED_ACTIVATIONS


@pytest.mark.parametrize("codec", BLOCKS)
@pytest.mark.parametrize(("n", "k", "groups"), [(70, 5200, 1), (40, 5200, 8), (8200, 600, 1)])
def test_long_rows_and_many_rows(
    kernels: Kernels, codec: Codec, n: int, k: int, groups: int
) -> None:
    """More blocks than are in flight, more columns than are held, more rows than CTAs."""
    w, x = matrices(kernels, codec, n, k), rows(3, k)
    norm = Norm(rows(1, k, seed=2)[0], 1e-5, groups)
    together = linear(kernels, x, w, norm=norm)
    assert relative(together, w.product(rms_norm(x, norm))) <= tolerances.ROUNDED_ACTIVATIONS
    assert same_bits(together[1:2], linear(kernels, x[1:2], w, norm=norm))


@pytest.mark.parametrize("codec", BLOCKS)
def test_squared_activations_stay_finite_and_accurate(kernels: Kernels, codec: Codec) -> None:
    w = matrices(kernels, codec, 40, 192)
    x = np.square(rows(6, 192)) * np.float32(1e9)
    assert relative(linear(kernels, x, w), w.product(x)) <= bound(kernels, codec)


@pytest.mark.parametrize("codec", list(Codec))
def test_rows_that_do_not_count_are_neither_read_nor_written(
    kernels: Kernels, codec: Codec
) -> None:
    w, x = matrices(kernels, codec, 40, 70), rows(5, 70)
    x[3:] = np.nan
    y = linear(kernels, x, w, live=3)
    assert np.isfinite(y[:3]).all()
    assert np.isnan(y[3:]).all()
    assert same_bits(y[:3], linear(kernels, x[:3].copy(), w))


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_activation_shows_in_its_row_only(kernels: Kernels, codec: Codec, bad: float) -> None:
    w, x = matrices(kernels, codec, 40, 130), rows(9, 130)
    clean = linear(kernels, x, w)
    x[4, 77] = bad
    y = linear(kernels, x, w)
    assert not np.isfinite(y[4]).any()
    others = np.arange(9) != 4
    assert same_bits(y[others], clean[others])


@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("vocab", [33, 640])
def test_head_reads_its_rows_and_masks(kernels: Kernels, codec: Codec, vocab: int) -> None:
    w, x = matrices(kernels, codec, vocab, 96), rows(11, 96)
    out_rows = [10, 0, 3, 3]
    allowed = np.random.default_rng(0).random((len(out_rows), vocab)) < 0.5
    padded = np.pad(allowed, ((0, 0), (0, -vocab % 32)))
    mask = np.packbits(padded, axis=1, bitorder="little").view(np.uint32)
    logits = np.full((len(out_rows), vocab), np.nan, np.float32)
    batch = Batch([11], [0], [0], out_rows=out_rows)
    kernels.run("head", PREFILL, batch, x=x, w=w.weight, mask=mask, logits=logits)
    want = w.product(x[out_rows])
    assert np.isneginf(logits[~allowed]).all()
    assert relative(logits[allowed], want[allowed]) <= bound(kernels, codec)


def test_head_refuses_a_row_outside_the_step() -> None:
    kernels = Kernels()
    w, x = matrices(kernels, Codec.F32, 8, 8), rows(2, 8)
    logits = np.zeros((1, 8), np.float32)
    batch = Batch([2], [0], [0], out_rows=[2])
    with pytest.raises(InvalidRequest, match=r"head: out_row\[0\] is 2, outside 0..n_tok-1 = 1"):
        kernels.run("head", PREFILL, batch, x=x, w=w.weight, logits=logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, r"linear: w is \[0\]\[8\]; n and k must be positive"),
        ({"k": -4}, r"linear: w is \[8\]\[-4\]"),
        ({"type": 2}, r"linear: w.type is 2; use EC_F32"),
        ({"data": None}, r"linear: w.data is NULL"),
    ],
)
def test_a_bad_weight_is_refused(change: dict[str, int | None], message: str) -> None:
    kernels = Kernels()
    w = matrices(kernels, Codec.F32, 8, 8)
    weight = Weight(w.weight.data, 0, 8, 8, 0, 1)
    for name, value in change.items():
        setattr(weight, name, value)
    x, y = np.zeros((1, 8), np.float32), np.zeros((1, 8), np.float32)
    with pytest.raises(InvalidRequest, match=message):
        kernels.run("linear", PREFILL, Batch([1], [0], [0]), x=x, w=weight, y=y)


def test_norm_groups_must_divide_k() -> None:
    kernels = Kernels()
    w, x = matrices(kernels, Codec.F32, 8, 10), rows(1, 10)
    with pytest.raises(InvalidRequest, match=r"norm.groups is 3, which does not divide k = 10"):
        linear(kernels, x, w, norm=Norm(np.ones(10, np.float32), 1e-5, 3))


def test_an_unknown_activation_is_refused() -> None:
    kernels = Kernels()
    w, x = matrices(kernels, Codec.F32, 8, 10), rows(1, 10)
    with pytest.raises(InvalidRequest, match="linear: act is 7"):
        linear(kernels, x, w, act=7)


def test_a_small_workspace_is_refused_with_both_sizes() -> None:
    kernels = Kernels()
    w, x, y = matrices(kernels, Codec.U4_64, 8, 64), rows(1, 64), np.zeros((1, 8), np.float32)
    args = ARGS["linear"](x=address(x), w=w.weight, y=address(y))
    workspace = np.zeros(128, np.uint8)
    step = Step(workspace=address(workspace), workspace_bytes=128, n_tok=1, n_seq=1)
    with pytest.raises(BackendError, match=r"linear: needs \d+ bytes of workspace"):
        kernels.library.run_op(1, kernels.stream, step, args)


@pytest.mark.parametrize("isa", cpu_isas())
def test_subnormals_count_as_zero_on_all_threads_and_only_there(isa: str) -> None:
    kernels = Kernels(isa)
    w = matrices(kernels, Codec.F32, 300, 20)
    assert not linear(kernels, np.full((40, 20), 1e-39, np.float32), w).any()
    assert linear(kernels, np.full((40, 20), 1e-30, np.float32), w).all()
    assert np.float32(1e-30) * np.float32(1e-10) > 0, "the caller computes as before"


@pytest.mark.parametrize("isa", cpu_isas())
def test_subnormal_halves_are_numbers(isa: str) -> None:
    kernels = Kernels(isa)
    w = matrices(kernels, Codec.F16, 32, 20)
    halves = w.data.view(np.float16)
    halves[:] = np.arange(1, len(halves) + 1) * 2.0**-24
    x = rows(3, 20)
    exact = x.astype(np.float64) @ halves.reshape(32, 20).astype(np.float64).T
    assert relative(linear(kernels, x, w), exact) <= tolerances.FLOAT_PRODUCT


def test_two_callers_of_one_pool_do_not_disturb_each_other() -> None:
    kernels = Kernels()
    w, inputs = matrices(kernels, Codec.U4_64, 500, 256), [rows(4, 256, seed=s) for s in range(2)]
    want = [linear(kernels, x, w) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not same_bits(linear(kernels, inputs[i], w), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
