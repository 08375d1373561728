# SPDX-License-Identifier: Apache-2.0
"""The parameters of a request, one check each, and the words of a refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from edgecascade.sampling import MAX_LOGPROBS
from edgecascade.service import wire

MAX_STOPS = 8
MAX_MESSAGES = 1024
MAX_TOOLS = 64
EFFORT_BUDGET = {"low": 512, "medium": 2048, "high": None}  # tokens of reasoning


# A check returns the value, or refuses with the parameter's name.
Check = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Problem:
    """Why a request was not answered, in OpenAI's words; `status` as in HTTP."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after_ms: int | None = None
    retryable: bool = False

    @property
    def type(self) -> str:
        """OpenAI's class of error."""
        if self.status in (429, 503):
            return "overloaded_error" if self.code != "rate_limited" else "rate_limit_error"
        if self.status == 403:
            return "permission_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


class Refused(Exception):
    """A request cannot be run; carries the answer."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def refuse(
    status: int, code: str, message: str, param: str | None = None, **facts: Any
) -> NoReturn:
    """Refuse the request."""
    raise Refused(Problem(status, code, message, param, **facts))


def kind_of(value: Any) -> str:
    """What JSON calls this value."""
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return "null" if value is None else names.get(type(value), "object")


def _wrong_type(name: str, value: Any, wanted: str) -> NoReturn:
    refuse(400, "invalid_type", f"{name} is a JSON {kind_of(value)}; it must be {wanted}", name)


def _number(low: float, high: float, *, above: bool = False) -> Check:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            _wrong_type(name, value, "a number")
        if not (low < value if above else low <= value) or value > high:
            opening, closing = "(" if above else "[", ")" if math.isinf(high) else "]"
            legal = f"{opening}{low:g}, {high:g}{closing}"
            refuse(400, "out_of_range", f"{name} is {value!r}; it must be in {legal}", name)
        return float(value)

    return check


def _integer(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            _wrong_type(name, value, "an integer")
        if not low <= value <= high:
            legal = f"[{low}, {high}]"
            refuse(400, "out_of_range", f"{name} is {value}; it must be in {legal}", name)
        return value

    return check


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        _wrong_type(name, value, "true or false")
    return value


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        _wrong_type(name, value, "a string")
    return value


def _one_of(*words: str) -> Check:
    def check(name: str, value: Any) -> str:
        if _string(name, value) not in words:
            legal = ", ".join(words)
            refuse(400, "out_of_range", f"{name} is {value[:40]!r}; it must be {legal}", name)
        return str(value)

    return check


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        _wrong_type(name, value, "an object")
    return value


def _objects(most: int, least: int = 0) -> Check:
    def check(name: str, value: Any) -> list[dict[str, Any]]:
        if not isinstance(value, list):
            _wrong_type(name, value, "an array of objects")
        if not least <= len(value) <= most:
            message = f"{name} has {len(value)} items; it must have {least} to {most}"
            refuse(400, "out_of_range", message, name)
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                _wrong_type(f"{name}[{index}]", item, "an object")
        return value

    return check


def _stop(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        _wrong_type(name, value, "a string or an array of strings")
    if len(texts) > MAX_STOPS:
        message = f"{name} has {len(texts)} strings; at most {MAX_STOPS} are allowed"
        refuse(400, "out_of_range", message, name)
    return tuple(_string(f"{name}[{index}]", text) for index, text in enumerate(texts))


def _response_format(name: str, value: Any) -> None:
    kind = _object(name, value).get("type")
    if kind != "text":
        message = f"{name}.type is {kind!r}; this device gives text only"
        refuse(400, "unsupported_value", message, name)


def _stream_options(name: str, value: Any) -> None:
    for key, given in _object(name, value).items():
        if key != "include_usage":  # the final always includes it
            refuse(400, "unknown_parameter", f"{name} has {key!r}", f"{name}.{key}")
        _boolean(f"{name}.{key}", given)


PARAMETERS: dict[str, Check] = {
    "id": _string,
    "model": _string,
    "messages": _objects(MAX_MESSAGES, least=1),
    "tools": _objects(MAX_TOOLS),
    "tool_choice": _one_of("auto", "none"),
    "stream": _boolean,
    "stream_options": _stream_options,
    "max_completion_tokens": _integer(1, 2**31 - 1),
    "max_tokens": _integer(1, 2**31 - 1),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1, above=True),
    "top_k": _integer(0, 2**31 - 1),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0, 10, above=True),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "seed": _integer(0, wire.MAX_INTEGER),
    "stop": _stop,
    "logprobs": _boolean,
    "top_logprobs": _integer(0, MAX_LOGPROBS),
    "n": _integer(1, 1),
    "response_format": _response_format,
    "reasoning_effort": _one_of("none", *EFFORT_BUDGET),
    "thinking_budget": _integer(0, 2**31 - 1),
    "user": _string,
    "priority": _integer(-10, 10),
    "timeout_s": _number(0, math.inf, above=True),
    "flush_ms": _integer(0, 10_000),
    "on_disconnect": _one_of("cancel", "finish"),
    "metadata": _object,
}
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
)


def checked(body: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a request by name; absent where null.

    Raises:
        Refused: naming the first that is unknown or cannot be.
    """
    given = {}
    for name, value in body.items():
        if name.startswith("x_"):
            continue
        check = PARAMETERS.get(name)
        if check is None:
            refuse(400, "unknown_parameter", f"{name[:80]!r} is not a parameter", name[:80])
        if value is not None:  # null asks for the default, as in OpenAI's API
            given[name] = check(name, value)
    return given


def parameter_in(message: str) -> str | None:
    """The request parameter that an error's message begins with, if any."""
    word = message.split(maxsplit=1)[0].partition("[")[0].partition(".")[0] if message else ""
    return word if word in PARAMETERS else None
