# SPDX-License-Identifier: Apache-2.0
"""Sampling: what parameters may say, and how a row of logits becomes a token."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgecascade.errors import BackendError, InvalidRequest
from edgecascade.sampling import (
    Draws,
    SampleRow,
    Sampling,
    SamplingParams,
    sample,
    top_logprobs,
)

NONE = np.zeros(0, np.int32)


def row(uniform: float = 0.0, *, seen: Any = NONE, count: Any = NONE, **params: Any) -> SampleRow:
    seen, count = (np.asarray(x, np.int32) for x in (seen, count))
    return SampleRow(Sampling(**params), uniform, seen, count)


def logits(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def distribution(values: NDArray[np.float32], steps: int = 4000, **params: Any) -> list[float]:
    """Share of the draws that each token gets, over an even grid of uniforms."""
    drawn = [sample(values, row((i + 0.5) / steps, **params))[0] for i in range(steps)]
    return [drawn.count(token) / steps for token in range(values.size)]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", -0.1, "temperature is -0.1"),
        ("temperature", math.nan, "temperature is nan"),
        ("temperature", math.inf, "temperature is inf"),
        ("temperature", "hot", "temperature is 'hot'"),
        ("temperature", True, "temperature is True"),
        ("temperature", 10**400, "temperature is 1000"),
        ("temperature", Fraction(10**400, 3), "temperature is Fraction"),
        ("temperature", 1e39, r"temperature is 1e\+39"),  # float32 on every backend
        ("top_p", 1e-50, "top_p is 1e-50"),
        ("repetition_penalty", 1e-50, "repetition_penalty is 1e-50"),
        pytest.param("max_tokens", 10**5000, "max_tokens is a huge int", id="huge"),
        ("top_p", 0, r"top_p is 0; it must be a number in \(0, 1\]"),
        ("top_p", 1.5, "top_p is 1.5"),
        ("top_k", -1, "top_k is -1"),
        ("top_k", 2.5, "top_k is 2.5"),
        ("min_p", 1.1, "min_p is 1.1"),
        ("repetition_penalty", 0, "repetition_penalty is 0"),
        ("presence_penalty", 3, "presence_penalty is 3"),
        ("frequency_penalty", -3, "frequency_penalty is -3"),
        ("max_tokens", 0, "max_tokens is 0"),
        ("seed", -1, "seed is -1"),
        ("seed", 2**64, f"seed is {2**64}"),
        ("logprobs", 21, r"logprobs is 21; it must be an integer in \[0, 20\]"),
        ("thinking_budget", -1, "thinking_budget is -1"),
        ("thinking", "no", "thinking is 'no'"),
        ("ignore_eos", None, "ignore_eos is None"),
        ("stop", ["x"] * 17, "stop has 17 strings; at most 16"),
        ("stop", "", "stop holds ''"),
        ("stop", ["x" * 257], "stop holds 257 characters"),
        ("stop", [1], "stop holds 1"),
        ("stop", 5, "stop is 5; it must be a list"),
        ("stop", np.array(1), r"stop is array\(1\); it must be a list"),
        ("stop_token_ids", {"a": 1}, "stop_token_ids is {'a': 1}; it must be a list"),
        ("stop_token_ids", [-1], "stop_token_ids holds -1"),
        ("stop_token_ids", ["a"], "stop_token_ids holds 'a'"),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name_and_value(
    name: str, value: Any, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        SamplingParams(**{name: value})


def test_a_budget_for_thinking_that_is_off_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="thinking_budget is 5 and thinking is False"):
        SamplingParams(thinking=False, thinking_budget=5)


def test_the_caller_comes_before_the_bundle_and_the_bundle_before_neutral() -> None:
    recommended = {"temperature": 0.6, "top_p": 0.95, "eos_token_id": [2]}
    resolved = SamplingParams(temperature=0, top_k=7).sampling(recommended)
    assert resolved == Sampling(temperature=0, top_p=float(np.float32(0.95)), top_k=7)
    assert SamplingParams().sampling({}) == Sampling()


def test_no_stops_may_be_written_as_none() -> None:
    params = SamplingParams(stop=None, stop_token_ids=None)
    assert (params.stops, params.stop_ids) == ((), ())


def test_numpy_numbers_are_numbers() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3))
    assert (params.temperature, params.top_k) == (0.5, 3)


def test_temperature_zero_takes_the_most_likely_and_of_equals_the_lowest_id() -> None:
    token, logprob = sample(logits(1, 3, 3, 0), row(0.99, temperature=0))
    assert token == 1
    assert logprob == pytest.approx(3 - math.log(math.e + 2 * math.e**3 + 1), abs=1e-6)


def test_draws_follow_the_softmax() -> None:
    values = logits(0, 1, 2, -np.inf)
    want = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    assert distribution(values) == pytest.approx([*want, 0], abs=1e-3)
    hot = np.exp(np.array([0, 1, 2]) / 2)
    assert distribution(values, temperature=2) == pytest.approx([*(hot / hot.sum()), 0], abs=1e-3)


def test_the_draw_goes_through_tokens_by_probability_and_then_by_id() -> None:
    values = logits(0, 1, 1, 2)
    order = [sample(values, row(u))[0] for u in np.linspace(0, 0.999, 200)]
    assert sorted(set(order), key=order.index) == [3, 1, 2, 0]


def test_top_k_keeps_the_k_most_likely() -> None:
    assert distribution(logits(1, 1, 1, 2), top_k=2) == pytest.approx(
        [1 / (1 + math.e), 0, 0, math.e / (1 + math.e)], abs=1e-3
    )
    assert sample(logits(5, 5, 1), row(0.999, top_k=1))[0] == 0


def test_top_p_keeps_the_smallest_start_that_reaches_it() -> None:
    values = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    assert distribution(values, top_p=0.4) == [1, 0, 0, 0]
    assert distribution(values, top_p=0.75) == pytest.approx([0.625, 0.375, 0, 0], abs=1e-3)
    assert distribution(values, top_p=1e-9) == [1, 0, 0, 0]


def test_top_p_counts_within_what_top_k_kept() -> None:
    values = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    # Of the two that remain the first has 4/7 > 0.5, of all four it has 0.4.
    assert distribution(values, top_k=2, top_p=0.5) == [1, 0, 0, 0]
    assert distribution(values, top_p=0.5)[1] > 0


def test_min_p_drops_what_is_far_below_the_best() -> None:
    values = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    assert distribution(values, min_p=0.5) == pytest.approx([0.625, 0.375, 0, 0], abs=1e-3)
    assert distribution(values, min_p=1) == [1, 0, 0, 0]


def test_repetition_pushes_seen_tokens_down_on_both_sides_of_zero() -> None:
    values = logits(2, -2, 1.5, -1.5)
    greedy = row(temperature=0, repetition_penalty=2, seen=[0, 1], count=[0, 3])
    assert sample(values, greedy)[0] == 2
    flipped = row(temperature=0, repetition_penalty=2, seen=[2, 3], count=[0, 0])
    assert sample(-values, flipped)[0] == 1


def test_presence_and_frequency_count_the_answer_only() -> None:
    values = logits(1.0, 0.8, 0.5)
    in_prompt = row(temperature=0, presence_penalty=1, seen=[0], count=[0])
    assert sample(values, in_prompt)[0] == 0
    present = row(temperature=0, presence_penalty=0.3, seen=[0], count=[5])
    assert sample(values, present)[0] == 1
    frequent = row(temperature=0, frequency_penalty=0.1, seen=[0, 1], count=[6, 4])
    assert sample(values, frequent)[0] == 2


def test_the_log_probability_is_of_the_raw_logits() -> None:
    values = logits(0, 1, 2)
    penalised = row(0, temperature=0, repetition_penalty=4, seen=[2], count=[1])
    token, logprob = sample(values, penalised)
    assert token == 1
    assert logprob == pytest.approx(1 - math.log(np.exp([0.0, 1, 2]).sum()), abs=1e-6)


def test_a_nan_is_never_chosen() -> None:
    values = logits(math.nan, 0, math.nan, -1)
    assert set(distribution(values, steps=50)[::2]) == {0}
    assert sample(values, row(temperature=0))[0] == 1
    assert math.isfinite(sample(values, row(temperature=0))[1])


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_row_without_any_candidate_is_an_error(bad: float) -> None:
    for temperature in (0, 1):
        with pytest.raises(BackendError, match="all 3 logits are NaN or -inf"):
            sample(np.full(3, bad, np.float32), row(temperature=temperature))


@settings(max_examples=200)
@given(
    values=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    uniform=st.floats(0, 1, exclude_max=True, width=32),
    temperature=st.floats(0, 5),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 50),
    min_p=st.floats(0, 1),
)
def test_whatever_is_drawn_passed_every_filter(
    values: list[float], uniform: float, temperature: float, top_p: float, top_k: int, min_p: float
) -> None:
    array = np.array(values, np.float32)
    token, logprob = sample(
        array, row(uniform, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    )
    ahead = int((array > array[token]).sum() + (array[:token] == array[token]).sum())
    assert ahead < (top_k or array.size)
    assert logprob <= 1e-6
    if temperature == 0:
        assert ahead == 0


def test_a_seed_makes_its_own_stream_of_draws() -> None:
    first, second, other = Draws(7), Draws(7), Draws(8)
    alone = [first.next() for _ in range(20)]
    mixed = [(second.next(), other.next())[0] for _ in range(20)]
    assert alone == mixed
    assert alone != [Draws(8).next() for _ in range(20)]
    assert all(0 <= u < 1 and u == float(np.float32(u)) for u in alone)


def test_without_a_seed_a_fresh_one_is_drawn_and_known() -> None:
    draws = Draws(None)
    assert draws.seed != Draws(None).seed
    assert Draws(draws.seed).next() == draws.next()


def test_top_logprobs_are_sorted_and_sum_to_one() -> None:
    top = top_logprobs(logits(0, 2, 2, math.nan, 1), 5)
    assert [token for token, _ in top][:4] == [1, 2, 4, 0]
    assert sum(math.exp(value) for _, value in top) == pytest.approx(1, abs=1e-6)


def test_a_drawn_seed_is_one_that_every_reader_of_json_takes() -> None:
    seeds = [Draws(None).seed for _ in range(100)]
    assert max(seeds) < 2**53
    assert len(set(seeds)) == 100
