# SPDX-License-Identifier: Apache-2.0
"""The sample op draws the token that edgecascade.sampling.sample draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import CUDA, DECODE, SETS, Batch, Kernels
from tolerances import LOGPROB

from edgecascade import sampling
from edgecascade.backends import _lib
from edgecascade.errors import InvalidRequest
from edgecascade.sampling import SampleRow, Sampling

ISAS = SETS
NONE = np.zeros(0, np.int32)


def draw(kernels: Kernels, logits: Any, rows: list[SampleRow], **changes: Any) -> Any:
    """Tokens and their log probabilities, one for each row of logits."""
    params = (_lib.Sampling * len(rows))()
    for to, row in zip(params, rows, strict=True):
        to.seen, to.count = kernels.place(row.seen), kernels.place(row.count)
        to.n_seen = len(row.seen)
        to.temperature, to.top_p, to.min_p = (
            row.params.temperature,
            row.params.top_p,
            row.params.min_p,
        )
        to.repetition, to.top_k = row.params.repetition_penalty, row.params.top_k
        to.presence = row.params.presence_penalty
        to.frequency = row.params.frequency_penalty
    uniform = np.array([row.uniform for row in rows], np.float32)
    token, logprob = np.full(len(rows), -7, np.int32), np.zeros(len(rows), np.float32)
    fields = {
        "logits": logits,
        "params": np.frombuffer(params, np.uint8),
        "uniform": uniform,
        "token": token,
        "logprob": logprob,
        "vocab": logits.shape[1],
    }
    batch = Batch([1], [0], [0], out_rows=[0] * len(rows))
    kernels.run("sample", DECODE, batch, **{**fields, **changes})
    return token, logprob


def assert_as_defined(kernels: Kernels, logits: Any, rows: list[SampleRow]) -> None:
    token, logprob = draw(kernels, logits, rows)
    for r, row in enumerate(rows):
        want, want_logprob = sampling.sample(logits[r], row)
        assert token[r] == want, f"row {r}: {row}"
        assert logprob[r] == pytest.approx(want_logprob, abs=LOGPROB)


def eighths(low: int, high: int) -> Any:
    """Numbers that float32 and Python hold alike."""
    return st.integers(low, high).map(lambda n: n / 8)


PARAMS = st.builds(
    Sampling,
    temperature=st.one_of(st.just(0.0), eighths(1, 40)),
    top_p=eighths(1, 8),
    top_k=st.sampled_from([0, 1, 2, 7, 40, 1000]),
    min_p=st.one_of(st.just(0.0), eighths(0, 8)),
    repetition_penalty=eighths(4, 16),
    presence_penalty=eighths(-16, 16),
    frequency_penalty=eighths(-16, 16),
)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=150)
@given(
    params=st.lists(PARAMS, min_size=1, max_size=4),
    vocab=st.sampled_from([1, 2, 15, 16, 17, 250, 5000]),
    spread=st.sampled_from([0.0, 0.5, 4.0, 60.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_token_is_the_definitions(
    isa: str, params: list[Sampling], vocab: int, spread: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = (spread * rng.standard_normal((len(params), vocab))).astype(np.float32)
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    logits[rng.random(logits.shape) < 0.05] = np.nan
    logits[rng.random(logits.shape) < 0.1] = np.float32(spread)  # ties
    logits[:, rng.integers(vocab)] = 0.25
    rows = []
    for one in params:
        seen = rng.permutation(vocab)[: rng.integers(0, vocab + 1)].astype(np.int32)
        count = rng.integers(0, 4, len(seen)).astype(np.int32)
        rows.append(SampleRow(one, float(rng.random(dtype=np.float32)), seen, count))
    assert_as_defined(Kernels(isa), logits, rows)


@pytest.mark.parametrize("isa", ISAS)
def test_beside_an_infinite_logit_nothing_has_a_chance(isa: str) -> None:
    logits = np.random.default_rng(2).standard_normal((1, 100)).astype(np.float32)
    logits[0, [7, 30]] = np.inf
    rows = [SampleRow(Sampling(), uniform, NONE, NONE) for uniform in (0.0, 0.4, 0.6, 0.99)]
    tokens, _ = draw(Kernels(isa), np.repeat(logits, 4, axis=0), rows)
    with np.errstate(invalid="ignore"):  # of their log probabilities
        want = [sampling.sample(logits[0], row)[0] for row in rows]
    assert tokens.tolist() == want == [7, 7, 7, 7]


@pytest.mark.parametrize("isa", ISAS)
def test_ties_at_a_cut_are_cut_in_float32(isa: str) -> None:
    logits = np.ones((1, 100), np.float32)
    params = sampling.SamplingParams(top_p=0.1).sampling({})
    for uniform in (0.05, 0.45, 0.95):
        assert_as_defined(Kernels(isa), logits, [SampleRow(params, uniform, NONE, NONE)])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_a_vocabulary_of_131072(isa: str, spread: float) -> None:
    rng = np.random.default_rng(5)
    settings_of = [
        Sampling(temperature=0),
        Sampling(),
        Sampling(top_p=0.9375),
        Sampling(temperature=0.5, top_p=0.9375, top_k=40),
        Sampling(temperature=4, min_p=0.0625),
        Sampling(temperature=1.5, top_k=100_000),
        Sampling(),
        Sampling(temperature=2),
    ]
    logits = (spread * rng.standard_normal((len(settings_of), 131072))).astype(np.float32)
    uniforms = rng.random(len(settings_of), dtype=np.float32)
    uniforms[-2] = 0.99999  # far out in the tail
    logits[-1, rng.permutation(131072)[3:]] = -np.inf  # a mask allows three
    rows = [
        SampleRow(one, float(uniform), NONE, NONE)
        for one, uniform in zip(settings_of, uniforms, strict=True)
    ]
    assert_as_defined(Kernels(isa), logits, rows)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("top_p", [1.0, 0.75])
def test_draws_follow_the_probabilities(isa: str, top_p: float) -> None:
    """A grid of uniforms meets every token as often as its probability says, to one draw."""
    draws, vocab = 256 if isa == CUDA else 4096, 50  # emulated, a draw takes milliseconds
    logits = np.random.default_rng(1).standard_normal(vocab).astype(np.float32)
    rows = [SampleRow(Sampling(top_p=top_p), (i + 0.5) / draws, NONE, NONE) for i in range(draws)]
    token, _ = draw(Kernels(isa), np.tile(logits, (draws, 1)), rows)
    p = np.exp(logits.astype(np.float64))
    order = np.argsort(-p)
    kept = order[: np.searchsorted(np.cumsum(p[order]) / p.sum(), top_p) + 1]
    want = np.zeros(vocab)
    want[kept] = p[kept] / p[kept].sum()
    assert np.abs(np.bincount(token, minlength=vocab) - draws * want).max() <= 1


@pytest.mark.parametrize("isa", ISAS)
def test_large_logits_cost_the_log_probability_no_digits(isa: str) -> None:
    logits = (2000 + np.random.default_rng(4).standard_normal((1, 5000))).astype(np.float32)
    assert_as_defined(Kernels(isa), logits, [SampleRow(Sampling(), 0.3, NONE, NONE)])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("temperature", [1e-38, 1e-9, 1e-3])
def test_a_tiny_temperature_is_greedy(isa: str, temperature: float) -> None:
    logits = np.random.default_rng(2).standard_normal((1, 1000)).astype(np.float32)
    row = SampleRow(Sampling(temperature=temperature), 0.999, NONE, NONE)
    assert draw(Kernels(isa), logits, [row])[0][0] == logits[0].argmax()


ROW = SampleRow(Sampling(), 0.5, np.array([1, 3], np.int32), np.array([0, 1], np.int32))


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (replace(ROW, params=Sampling(temperature=-1.0)), "temperature is -1"),
        (replace(ROW, params=Sampling(temperature=float("nan"))), "temperature is nan"),
        (replace(ROW, params=Sampling(top_p=0.0)), r"top_p is 0, must be in \(0, 1\]"),
        (replace(ROW, params=Sampling(min_p=1.5)), r"min_p is 1.5, must be in \[0, 1\]"),
        (replace(ROW, params=Sampling(repetition_penalty=0.0)), "repetition is 0"),
        (replace(ROW, params=Sampling(top_k=-3)), "top_k is -3"),
        (replace(ROW, uniform=1.0), r"uniform\[1\] is 1, must be in \[0, 1\)"),
        (replace(ROW, seen=np.array([1, 9], np.int32)), r"seen\[1\] is 9, the vocabulary has 9"),
    ],
)
def test_bad_numbers_are_named(row: SampleRow, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        draw(Kernels(), np.zeros((2, 9), np.float32), [ROW, row])


@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_a_row_without_a_token_to_choose_is_an_error(value: float) -> None:
    logits = np.zeros((2, 33), np.float32)
    logits[1] = value
    with pytest.raises(InvalidRequest, match="row 1 has no token to choose: all 33 logits are NaN"):
        draw(Kernels(), logits, [ROW, ROW])
