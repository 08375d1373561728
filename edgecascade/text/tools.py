# SPDX-License-Identifier: Apache-2.0
"""Tool calls in qwen3-coder XML, read from a stream of text into structured calls.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

A value is raw text; its type comes from the tool's JSON schema. One line break on each side of it
is markup. A call that cannot be read stays in the text, with a note: a robot must not act on half
a command.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgecascade.errors import InvalidRequest
from edgecascade.text.stops import tail_that_may_become

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
MAX_DEPTH = 32  # of a schema's $ref, anyOf, oneOf and allOf in each other


@dataclass(frozen=True)
class ToolCall:
    """One call the model asked for, its arguments typed by the tool's schema."""

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        """As a reader would write it: move(direction="forward", distance=2)."""
        pairs = self.arguments.items()
        values = (f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in pairs)
        return f"{self.name}({', '.join(values)})"


@dataclass(frozen=True)
class ToolText:
    """What a piece of text added: plain text, complete calls, notes on calls that make no sense."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    errors: tuple[str, ...] = ()


class MalformedCall(ValueError):
    """A tool call that cannot be read; the message says why."""


@dataclass
class ToolParser:
    """Separates calls from text as it streams; white space around calls belongs to neither."""

    tools: Sequence[Mapping[str, Any]]
    _held: str = field(default="", init=False)
    _inside: bool = field(default=False, init=False)
    _after_call: bool = field(default=False, init=False)

    def push(self, text: str) -> ToolText:
        """The text that certainly is text, and the calls that are complete."""
        self._held += text
        shown: list[str] = []
        calls: list[ToolCall] = []
        errors: list[str] = []
        while True:
            if not self._inside:
                before, opened, rest = self._held.partition(OPEN)
                if not opened:
                    break
                shown.append(self._plain(before.rstrip()))
                self._held, self._inside = rest, True
            body, closed, rest = self._held.partition(CLOSE)
            if not closed:
                break
            self._held, self._inside = rest, False
            self._finish(body, OPEN + body + CLOSE, shown, calls, errors)
        if not self._inside:
            solid = self._held[: len(self._held) - tail_that_may_become(self._held, (OPEN,))]
            solid = solid.rstrip()
            shown.append(self._plain(solid))
            self._held = self._held[len(solid) :]
        return ToolText("".join(shown), tuple(calls), tuple(errors))

    def flush(self) -> ToolText:
        """What is left at the end: a call that lacks only its last mark, or text."""
        held, self._held = self._held, ""
        if not self._inside:
            return ToolText(self._plain(held) if held.strip() or not self._after_call else "")
        self._inside = False
        shown: list[str] = []
        calls: list[ToolCall] = []
        errors: list[str] = []
        self._finish(held, OPEN + held, shown, calls, errors)
        return ToolText("".join(shown), tuple(calls), tuple(errors))

    def _finish(
        self, body: str, raw: str, shown: list[str], calls: list[ToolCall], errors: list[str]
    ) -> None:
        try:
            calls.append(parse_call(body, self.tools))
            self._after_call = True
        except MalformedCall as error:
            errors.append(str(error))
            shown.append(self._plain(raw))

    def _plain(self, text: str) -> str:
        if text and self._after_call:
            text = text.lstrip()
            self._after_call = not text
        return text


def parse_call(body: str, tools: Sequence[Mapping[str, Any]]) -> ToolCall:
    """Read what stands between <tool_call> and </tool_call>.

    Raises:
        MalformedCall: when it is not one function of `tools` with values that fit its schema.
    """
    name, rest = _tag(body.strip(), "function")
    schema = parameters(name, tools)
    if schema is None:
        known = ", ".join(repr(tool["function"]["name"]) for tool in tools)
        raise MalformedCall(f"there is no tool {name!r}, only {known}")
    inner, closed, tail = rest.rpartition("</function>")
    if not closed or tail.strip():
        raise MalformedCall(f"function {name!r} is not closed by </function>")
    arguments: dict[str, Any] = {}
    while inner.strip():
        key, inner = _tag(inner.lstrip(), "parameter")
        value, closed, inner = inner.partition("</parameter>")
        if not closed:
            raise MalformedCall(f"parameter {key!r} of {name!r} is not closed by </parameter>")
        if key in arguments:
            raise MalformedCall(f"parameter {key!r} of {name!r} is given twice")
        value = value.removeprefix("\n").removesuffix("\n")
        try:
            arguments[key] = typed(value, schema.get("properties", {}).get(key), schema)
        except ValueError as error:
            raise MalformedCall(f"parameter {key!r} of {name!r}: {error}") from error
    missing = [key for key in schema.get("required", ()) if key not in arguments]
    if missing:
        raise MalformedCall(f"{name!r} lacks its parameter {missing[0]!r}")
    return ToolCall(name, arguments)


def parameters(name: str, tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The schema of a tool's arguments; None when there is no such tool."""
    for tool in tools:
        if tool["function"]["name"] == name:
            return tool["function"].get("parameters") or {}
    return None


def typed(value: str, schema: Any, root: Mapping[str, Any]) -> Any:
    """A raw value as the type its schema asks for; without a schema it stays text.

    Raises:
        ValueError: when it has none of the types.
    """
    kinds = _known(_kinds(schema, root, set()))
    for kind in kinds:
        # Text fits everything, so it comes last.
        found, result = _READERS[kind](value)
        if found:
            return result
    raise ValueError(f"{value[:80]!r} is not {' or '.join(kinds)}")


def checked_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Tools in the form of OpenAI's API; a bare function is wrapped.

    Raises:
        InvalidRequest: when one has no name, or a name twice.
    """
    if tools is not None and (isinstance(tools, str | Mapping) or not isinstance(tools, Iterable)):
        raise InvalidRequest(f"tools is {type(tools).__name__}; it must be a list of dicts")
    checked: list[dict[str, Any]] = []
    for index, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            raise InvalidRequest(f"tools[{index}] is {type(tool).__name__}; it must be a dict")
        function = tool.get("function", tool if "type" not in tool else None)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise InvalidRequest(f"tools[{index}] has no function with a name")
        if any(known["function"]["name"] == name for known in checked):
            raise InvalidRequest(f"tools[{index}] repeats the name {name!r}")
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise InvalidRequest(f"tools[{index}]: parameters of {name!r} must be a JSON schema")
        if not isinstance(parameters.get("properties", {}), Mapping):
            raise InvalidRequest(f"tools[{index}]: properties of {name!r} must be a dict")
        required = parameters.get("required", [])
        if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
            raise InvalidRequest(f"tools[{index}]: required of {name!r} must be a list of names")
        checked.append({"type": "function", "function": dict(function)})
    try:
        json.dumps(checked, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"tools must be plain JSON values: {error}") from error
    return checked


def _tag(text: str, word: str) -> tuple[str, str]:
    head = f"<{word}="
    name, closed, rest = text.removeprefix(head).partition(">")
    if not text.startswith(head) or not closed or not name.strip():
        raise MalformedCall(f"{text[:40]!r} stands where <{word}=...> should")
    return name.strip(), rest


def _kinds(schema: Any, root: Mapping[str, Any], followed: set[str], depth: int = 0) -> list[Any]:
    """What a schema names as JSON types; each reference in it is followed once."""
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return ["string"]
    kinds: list[Any] = []
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in followed:
        followed.add(reference)
        kinds += _kinds(_resolve(reference, root), root, followed, depth + 1)
    kind = schema.get("type")
    kinds += [kind] if isinstance(kind, str) else _listed(kind)
    for word in ("anyOf", "oneOf", "allOf"):
        for option in _listed(schema.get(word)):
            kinds += _kinds(option, root, followed, depth + 1)
    values = _listed(schema.get("enum")) + ([schema["const"]] if "const" in schema else [])
    return kinds or [_JSON_NAMES.get(type(value), "string") for value in values]


def _known(kinds: list[Any]) -> list[str]:
    """The types that have a reader, "string" last; where none has, the value is text."""
    names = dict.fromkeys(kind for kind in kinds if isinstance(kind, str))
    known = [name for name in names if name in _READERS]
    return sorted(known, key=lambda name: name == "string") or ["string"]


def _listed(value: Any) -> list[Any]:
    """A schema's list; one of another type says nothing."""
    return list(value) if isinstance(value, list | tuple) else []


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    node: Any = root
    for part in reference.removeprefix("#/").split("/"):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _json(value: str, *types: type) -> tuple[bool, Any]:
    try:
        result = json.loads(value, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return False, None
    return type(result) in types, result


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _integer(value: str) -> tuple[bool, Any]:
    found, result = _json(value.strip(), int, float)
    whole = found and (isinstance(result, int) or result.is_integer())
    return whole, int(result) if whole else None


def _boolean(value: str) -> tuple[bool, Any]:
    word = value.strip().lower()  # models write Python's True as often as JSON's true
    return word in ("true", "false"), word == "true"


def _null(value: str) -> tuple[bool, Any]:
    return value.strip().lower() in ("null", "none"), None


_READERS: dict[str, Callable[[str], tuple[bool, Any]]] = {
    "integer": _integer,
    "number": lambda value: _json(value.strip(), int, float),
    "boolean": _boolean,
    "object": lambda value: _json(value, dict),
    "array": lambda value: _json(value, list),
    "null": _null,
    "string": lambda value: (True, value),
}
_JSON_NAMES = {int: "integer", float: "number", bool: "boolean", type(None): "null"}
