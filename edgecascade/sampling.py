# SPDX-License-Identifier: Apache-2.0
"""What a caller may ask of a generation, and how logits become a token.

`sample` is the definition; every backend's `sample` op draws the same token from the same numbers.
"""

from __future__ import annotations

import math
import reprlib
import secrets
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache, cached_property
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgecascade.errors import BackendError, InvalidRequest

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


class Logits(Protocol):
    """Float32 logits of one token [vocab] or of several [rows, vocab], wherever they were computed.

    An array is one. `np.asarray` brings those of a device to the host; an index, a slice or None
    picks rows without doing so. The values stay whatever the backend does next.
    """

    def __getitem__(self, at: Any, /) -> Any: ...

    def __len__(self) -> int: ...

    def __array__(self) -> npt.NDArray[Any]: ...


@dataclass(frozen=True)
class Sampling:
    """The numbers that turn one row of logits into a token; nothing left open."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def penalises(self) -> bool:
        """Whether earlier tokens matter."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


@dataclass(frozen=True)
class SampleRow:
    """One row to sample: its numbers, its draw in [0, 1), and the distinct tokens seen so far.

    `count` says how often each of `seen` occurs in the answer: 0 if only in the prompt.
    """

    params: Sampling
    uniform: float
    seen: Ints
    count: Ints


@dataclass(frozen=True)
class SamplingParams:
    """What a caller may ask of one generation. None: as the bundle recommends.

    `temperature` 0 is greedy. `top_k` 0 keeps all tokens. `max_tokens` counts reasoning too; None
    goes on until the context is full. `stop` strings end the answer (not the reasoning) and are not
    part of it. `thinking` switches the reasoning on or off where the chat template can;
    `thinking_budget` closes it after about so many tokens. `seed` None draws a fresh one, which the
    completion reports.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | Iterable[str] | None = ()
    stop_token_ids: Iterable[int] | None = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    thinking: bool | None = None
    thinking_budget: int | None = None

    def __post_init__(self) -> None:
        for name, words, holds in (
            ("temperature", "at least 0", lambda x: x >= 0),
            ("top_p", "in (0, 1]", lambda x: 0 < x <= 1),
            ("min_p", "in [0, 1]", lambda x: 0 <= x <= 1),
            ("repetition_penalty", "above 0", lambda x: x > 0),
            ("presence_penalty", "in [-2, 2]", lambda x: -2 <= x <= 2),
            ("frequency_penalty", "in [-2, 2]", lambda x: -2 <= x <= 2),
        ):
            self._number(name, words, holds)
        for name, low, high in (
            ("max_tokens", 1, 2**31 - 1),
            ("top_k", 0, 2**31 - 1),
            ("seed", 0, 2**64 - 1),
            ("logprobs", 0, MAX_LOGPROBS),
            ("thinking_budget", 0, 2**31 - 1),
        ):
            self._integer(name, low, high)
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        for name in ("ignore_eos", "thinking"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (name == "ignore_eos" or value is not None):
                raise InvalidRequest(f"{name} is {_shown(value)}; it must be True or False")
        if self.thinking is False and self.thinking_budget is not None:
            raise InvalidRequest(
                f"thinking_budget is {self.thinking_budget} and thinking is False; set one of them"
            )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return _stops(self.stop)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The stop tokens, beside the bundle's own."""
        return _token_ids(self.stop_token_ids)

    @classmethod
    @cache
    def names(cls) -> tuple[str, ...]:
        """The parameters a caller may give by keyword."""
        return tuple(field.name for field in fields(cls))

    def sampling(self, recommended: Mapping[str, Any]) -> Sampling:
        """The numbers to sample with: the caller's, else the bundle's, else neutral ones; rounded
        to float32, in which backends compute, so that the definition draws what they draw.
        """
        merged: dict[str, Any] = {}
        for field in fields(Sampling):
            value = getattr(self, field.name)
            value = recommended.get(field.name) if value is None else value
            if value is not None:
                merged[field.name] = value if field.name == "top_k" else _in_float32(value)
        return Sampling(**merged)

    def _number(self, name: str, words: str, holds: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        if value is None:
            return
        number = _in_float32(value) if isinstance(value, Real) else math.nan
        if isinstance(value, bool) or not math.isfinite(number) or not holds(number):
            raise InvalidRequest(
                f"{name} is {_shown(value)}; it must be a number {words}, in float32"
            )
        object.__setattr__(self, name, float(value))

    def _integer(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if (
            isinstance(value, bool)
            or not isinstance(value, Integral)
            or not low <= int(value) <= high
        ):
            raise InvalidRequest(
                f"{name} is {_shown(value)}; it must be an integer in [{low}, {high}]"
            )
        object.__setattr__(self, name, int(value))


def _in_float32(value: Real) -> float:
    """The number that a backend computes with; infinite beyond its range."""
    try:
        (number,) = struct.unpack("f", struct.pack("f", float(value)))
    except OverflowError:
        return math.inf
    return float(number)


def _shown(value: object) -> str:
    """A value for a message, shortened."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not write out integers of thousands of digits
        return f"a huge {type(value).__name__}"


def _items(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    try:
        if not isinstance(value, Mapping):
            return tuple(value)
    except TypeError:  # nothing to iterate over
        pass
    raise InvalidRequest(f"{name} is {_shown(value)}; it must be a list")


def _stops(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else _items("stop", stop)
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop has {len(stops)} strings; at most {MAX_STOPS} are allowed")
    for text in stops:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
            shown = (
                _shown(text) if not isinstance(text, str) or not text else f"{len(text)} characters"
            )
            raise InvalidRequest(
                f"stop holds {shown}; each must be a string of 1 to {MAX_STOP_CHARS} characters"
            )
        if any("\ud800" <= char <= "\udfff" for char in text):  # half a character is never made
            raise InvalidRequest(
                f"stop holds {_shown(text)}, which is not valid Unicode; it came from bytes that "
                "are not UTF-8"
            )
    return stops


def _token_ids(ids: Any) -> tuple[int, ...]:
    ids = _items("stop_token_ids", ids)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, Integral) or token < 0:
            raise InvalidRequest(
                f"stop_token_ids holds {_shown(token)}; each must be an integer >= 0"
            )
    return tuple(int(token) for token in ids)


class Draws:
    """One stream of uniform numbers per request: its tokens do not depend on its company."""

    def __init__(self, seed: int | None) -> None:
        # JSON's readers agree on integers up to 2^53.
        self.seed = secrets.randbits(53) if seed is None else seed

    @cached_property
    def _stream(self) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self.seed))

    def next(self) -> float:
        """A float32 in [0, 1): the sample op takes it in this precision on every backend."""
        return float(self._stream.random(dtype=np.float32))


def sample(logits: Floats, row: SampleRow) -> tuple[int, float]:
    """Draw a token from one row of logits: (token, log softmax of the raw logits at the token).

    Penalties, temperature, top-k, top-p, min-p, then the first token whose cumulative probability
    exceeds the draw, in the order (probability descending, id ascending). A NaN is never chosen.
    """
    params = row.params
    scores = penalised(logits, row)
    scores[np.isnan(scores)] = -np.inf
    best = int(np.argmax(scores))
    if scores[best] == -np.inf:
        raise BackendError(
            f"no token can be chosen: all {logits.size} logits are NaN or -inf; "
            "the mask allows nothing, or the weights are damaged"
        )
    if params.temperature == 0 or scores[best] == np.inf:  # beside which nothing has a chance
        return best, logprob(logits, best)
    order = np.argsort(-scores, kind="stable")[: params.top_k or None]
    order = order[scores[order] > -np.inf]
    with np.errstate(over="ignore", under="ignore"):
        p = np.exp((scores[order].astype(np.float64) - float(scores[best])) / params.temperature)
    if params.top_p < 1:  # at 1 rounding of the sum must not cost the last tokens
        mass = np.cumsum(p)  # over the first one's: exact where all are equal
        p = p[: int(np.searchsorted(mass, params.top_p * mass[-1])) + 1]
    p = p[p >= params.min_p]
    cumulative = np.cumsum(p)
    drawn = int(np.searchsorted(cumulative, row.uniform * cumulative[-1], side="right"))
    token = int(order[min(drawn, p.size - 1)])
    return token, logprob(logits, token)


def penalised(logits: Floats, row: SampleRow) -> Floats:
    """Logits after the penalties on tokens seen before."""
    scores = np.array(logits, np.float32)
    params = row.params
    if params.penalises and row.seen.size:
        seen = scores[row.seen]
        repetition = np.float32(params.repetition_penalty)
        seen = np.where(seen > 0, seen / repetition, seen * repetition)
        seen -= np.float32(params.presence_penalty) * (row.count > 0)
        seen -= np.float32(params.frequency_penalty) * row.count.astype(np.float32)
        scores[row.seen] = seen
    return scores


def logprob(logits: Logits, token: int) -> float:
    """Log softmax of a row at one token."""
    logits = np.asarray(logits)
    return float(logits[token]) - _logsumexp(logits)


def top_logprobs(logits: Logits, n: int) -> tuple[tuple[int, float], ...]:
    """The n most likely tokens of a row with their log softmax, ties in order of id."""
    logits = np.asarray(logits)
    norm = _logsumexp(logits)
    scores = np.where(np.isnan(logits), -np.inf, logits)
    order = np.argsort(-scores, kind="stable")[:n]
    return tuple((int(token), float(scores[token]) - norm) for token in order)


def _logsumexp(logits: Floats) -> float:
    values = logits[~np.isnan(logits)].astype(np.float64)
    top = float(values.max())
    return top + math.log(float(np.exp(values - top).sum()))
