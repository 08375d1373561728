# SPDX-License-Identifier: Apache-2.0
"""Answers and logits to figures: right or wrong, how surely, how far two bundles are apart.

No model here: completions and rows of log probabilities in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecascade.completion import Completion
from edgecascade.suite import Sample, call_problem, content_problem, loads

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Score:
    """Whether an answer is right and well formed.

    `valid` is None where the sample has neither tools nor a schema; `why` says what is wrong.
    """

    exact: bool
    valid: bool | None
    why: str = ""


@dataclass(frozen=True)
class Likelihood:
    """What one bundle says about given tokens: how many, and the sum of -log p."""

    tokens: int
    nll: float


@dataclass(frozen=True)
class Contrast:
    """Two bundles on the same given tokens: summed KL(other ‖ this), and how often both rank the
    same token first.
    """

    tokens: int
    divergence: float
    agreed: int


@dataclass(frozen=True)
class Answer:
    """One sample on one bundle."""

    completion: Completion
    score: Score
    likelihood: Likelihood | None


@dataclass(frozen=True)
class Result:
    """One sample: the bundle's answer, the other's, and what separates them."""

    sample: Sample
    answer: Answer
    other: Answer | None = None
    contrast: Contrast | None = None


@dataclass(frozen=True)
class Share:
    """So many of so many, with Wilson's 95 % interval."""

    count: int
    of: int

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.count / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """Where the true share lies with 95 % confidence."""
        return wilson(self.count, self.of)


@dataclass(frozen=True)
class Figures:
    """Sums over some samples; None where none of them has what it takes."""

    samples: int
    exact: Share
    valid: Share | None
    target_tokens: int
    perplexity: float | None
    other_exact: Share | None = None
    other_valid: Share | None = None
    other_perplexity: float | None = None
    same_answer: Share | None = None
    divergence: float | None = None  # nats a token
    agreement: Share | None = None  # of tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as for JSON."""
        made: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Share):
                made[name] = {
                    "count": value.count,
                    "of": value.of,
                    "share": value.share,
                    "interval": list(value.interval),
                }
            else:
                made[name] = value
        return made


def score(sample: Sample, answer: Completion) -> Score:
    """Compare an answer with what the sample expects; the reasoning does not count."""
    fault = _fault(sample, answer)
    checked = bool(sample.tools) or sample.schema is not None
    valid = fault is None if checked else None
    why = _difference(sample, answer)
    return Score(exact=not why, valid=valid, why="; ".join(filter(None, (why, fault))))


def same_json(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same: 1 is 1.0, but true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return bool(one == other)


def wilson(count: int, of: int) -> tuple[float, float]:
    """The interval of a share with 95 % confidence; sound near 0 and 1, and for few samples."""
    z = 1.959963984540054
    share, spread = count / of, z * z / of
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / of + spread / (4 * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def log_softmax(logits: npt.NDArray[Any]) -> Floats:
    """Rows of log probabilities."""
    rows = logits.astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
    return rows


def likelihood(rows: Floats, tokens: Sequence[int]) -> Likelihood:
    """Of the tokens under rows of log probabilities."""
    chosen = rows[np.arange(len(tokens)), list(tokens)]
    return Likelihood(len(tokens), -float(chosen.sum()))


def contrast(rows: Floats, others: Floats) -> Contrast:
    """KL(other ‖ this) and agreement of two sets of rows of log probabilities."""
    with np.errstate(invalid="ignore"):  # a logit of -inf on both sides adds nothing
        terms = np.where(others > -np.inf, np.exp(others) * (others - rows), 0)
    agreed = int((rows.argmax(-1) == others.argmax(-1)).sum())
    return Contrast(len(rows), max(0.0, float(terms.sum())), agreed)


def summarize(results: Iterable[Result]) -> Figures:
    """Figures of some results, of which there must be at least one."""
    results = list(results)
    mine = [result.answer for result in results]
    pairs = [result.contrast for result in results if result.contrast is not None]
    tokens = sum(pair.tokens for pair in pairs)
    compared = [(r.answer, r.other) for r in results if r.other is not None]
    same = [one.completion.token_ids == two.completion.token_ids for one, two in compared]
    exact, valid, perplexity = _sums(mine)
    other_exact, other_valid, other_perplexity = _sums([other for _, other in compared])
    assert exact is not None
    return Figures(
        samples=len(results),
        exact=exact,
        valid=valid,
        target_tokens=sum(each.likelihood.tokens for each in mine if each.likelihood),
        perplexity=perplexity,
        other_exact=other_exact,
        other_valid=other_valid,
        other_perplexity=other_perplexity,
        same_answer=_share(same),
        divergence=sum(pair.divergence for pair in pairs) / tokens if tokens else None,
        agreement=Share(sum(pair.agreed for pair in pairs), tokens) if tokens else None,
    )


def _sums(answers: Sequence[Answer]) -> tuple[Share | None, Share | None, float | None]:
    given = [each.likelihood for each in answers if each.likelihood is not None]
    tokens, nll = sum(each.tokens for each in given), sum(each.nll for each in given)
    valid = [each.score.valid for each in answers if each.score.valid is not None]
    exact = _share([each.score.exact for each in answers])
    return exact, _share(valid), math.exp(min(nll / tokens, 700)) if tokens else None


def _share(hits: Sequence[bool]) -> Share | None:
    return Share(sum(hits), len(hits)) if hits else None


def _difference(sample: Sample, answer: Completion) -> str:
    """What an answer has other than expected; nothing when it is right."""
    if len(answer.tool_calls) != len(sample.calls):
        got, want = (
            " ".join(map(str, calls)) or "none" for calls in (answer.tool_calls, sample.calls)
        )
        return f"calls are {got}, expected {want}"
    for number, (call, right) in enumerate(zip(answer.tool_calls, sample.calls, strict=True), 1):
        if call.name != right.name or not same_json(call.arguments, right.arguments):
            return f"call {number} is {call}, expected {right}"
    if sample.schema is not None:
        try:
            same = same_json(loads(answer.text), loads(sample.content))
        except ValueError:
            same = False
    else:
        same = answer.text.strip() == sample.content.strip()
    return "" if same else f"content is {answer.text!r}, expected {sample.content!r}"


def _fault(sample: Sample, answer: Completion) -> str | None:
    """What makes an answer useless as a command, right or wrong."""
    if answer.finish_reason == "length":
        return "it did not end"
    if answer.tool_errors:
        return answer.tool_errors[0]
    for call in answer.tool_calls:
        fault = call_problem(call, sample.tools)
        if fault:
            return f"call of {call.name!r}: {fault}"
    return None if sample.schema is None else content_problem(answer.text, sample.schema)
