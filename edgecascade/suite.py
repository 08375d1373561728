# SPDX-License-Identifier: Apache-2.0
"""A suite: prompts with their right answers, one JSON object a line (docs/evaluation.md).

The reader is strict. A line that is not what the format says is an error with its number: a
misspelt key would make a sample easier, or harder, than its author thinks.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from edgecascade.errors import InvalidRequest, SuiteError
from edgecascade.files import no_constant, unique_keys
from edgecascade.text.template import checked_messages
from edgecascade.text.tokenizer import checked_text
from edgecascade.text.tools import ToolCall, checked_tools, parameters

FORMAT = 1
MAX_SUITE_BYTES = 256 << 20
DEFAULT_MAX_TOKENS = 512
OURS = Path(__file__).resolve().parent / "suites"

Tools = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Sample:
    """One prompt, what is right to answer, and the text to measure the perplexity on, if any."""

    line: int
    id: str
    split: str
    skill: str
    messages: tuple[Mapping[str, Any], ...]
    raw: str | None  # a text to be continued, in the place of messages
    tools: Tools
    thinking: bool | None
    schema: Mapping[str, Any] | None
    content: str
    calls: tuple[ToolCall, ...]
    target: str | None


@dataclass(frozen=True)
class Suite:
    """Samples in the order of their file. `splits` says in a line what each of them is."""

    name: str
    file: str
    sha256: str
    splits: Mapping[str, str]
    max_tokens: int
    samples: tuple[Sample, ...]

    def part(self, splits: Iterable[str] = (), limit: int | None = None) -> Suite:
        """Only these splits, and of each at most `limit` samples, evenly taken.

        Raises:
            SuiteError: for a split that the suite does not have.
        """
        names = list(splits) or list(self.splits)
        for name in names:
            if name not in self.splits:
                known = ", ".join(self.splits)
                raise SuiteError(f"{self.file} has no split {name!r}; it has {known}")
        samples: list[Sample] = []
        for name in self.splits:
            if name in names:
                samples += _evenly([s for s in self.samples if s.split == name], limit)
        if not samples:
            raise SuiteError(f"{self.file} has no samples in {', '.join(names)}")
        kept = {name: words for name, words in self.splits.items() if name in names}
        return replace(self, splits=kept, samples=tuple(samples))


def find_suite(name: str, beside: Sequence[str | Path] = ()) -> Path:
    """The file of a suite: a path, or a name that is looked up in suites/ next to the bundles
    `beside`, then among those of this package.

    Raises:
        SuiteError: saying where it was looked for.
    """
    if "/" in name or name.endswith(".jsonl"):
        return Path(name)
    folders = [*dict.fromkeys(Path(bundle).resolve().parent / "suites" for bundle in beside), OURS]
    for folder in folders:
        file = folder / f"{name}.jsonl"
        if file.is_file():
            return file
    known = sorted({file.stem for folder in folders for file in folder.glob("*.jsonl")})
    raise SuiteError(
        f"there is no suite {name!r} in {', '.join(map(str, folders))}; "
        f"give a path, or one of {', '.join(known) or 'no names: these folders hold none'}"
    )


def read_suite(path: str | Path) -> Suite:
    """Read a suite's file.

    Raises:
        SuiteError: for a file that cannot be read, or with the line that is wrong, and why.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_SUITE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path that cannot be, such as "a\0b"
        raise SuiteError(f"cannot read the suite {str(path)!r}: {error}") from error
    if len(data) > MAX_SUITE_BYTES:
        raise SuiteError(f"{path} is larger than {MAX_SUITE_BYTES >> 20} MiB; divide it")
    return parse_suite(data, str(path))


def parse_suite(data: bytes, file: str) -> Suite:
    """What read_suite() makes of a file's bytes."""
    lines = data.splitlines()
    suite, tools, samples = None, dict[str, Tools](), list[Sample]()
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            if suite is None:
                suite, tools = _header(_object(line), file, hashlib.sha256(data).hexdigest())
                continue
            sample = _sample(_object(line), number, suite, tools)
            if sample.id in first_line:
                _refuse(f"id {sample.id!r} is that of line {first_line[sample.id]}")
        except InvalidRequest as error:
            raise SuiteError(f"{file}:{number}: {error}") from error
        first_line[sample.id] = number
        samples.append(sample)
    if suite is None or not samples:
        raise SuiteError(f"{file} has {len(lines)} lines; a suite is a header and its samples")
    return replace(suite, samples=tuple(samples))


def problem(value: Any, schema: Mapping[str, Any]) -> str | None:
    """What keeps a value from conforming to a JSON schema; None when it does."""
    from jsonschema.exceptions import best_match
    from referencing.exceptions import Unresolvable

    try:
        error = best_match(_validator(json.dumps(schema)).iter_errors(value))
    except (Unresolvable, RecursionError, OverflowError) as wrong:  # 1e400 is multipleOf nothing
        return f"its schema cannot be followed: {str(wrong)[:200] or 'it is nested too deep'}"
    if error is None:
        return None
    return f"{error.json_path.removeprefix('$').removeprefix('.') or 'it'}: {error.message[:200]}"


def call_problem(call: ToolCall, tools: Tools) -> str | None:
    """What keeps a call of one of these tools from conforming to it."""
    return problem(call.arguments, parameters(call.name, tools) or {})


@lru_cache(maxsize=1024)
def _validator(schema: str) -> Any:
    # Imported here: only suites with tools or schemas need it.
    from jsonschema import Draft202012Validator
    from referencing import Registry

    # With a registry of its own it never fetches a $ref from the network.
    return Draft202012Validator(json.loads(schema), registry=Registry())


def _header(value: dict[str, Any], file: str, sha256: str) -> tuple[Suite, dict[str, Tools]]:
    _check_keys(value, "suite format splits", "description tools max_tokens")
    if value["format"] != FORMAT or isinstance(value["format"], bool):
        _refuse(f"format is {_shown(value['format'])}; this version reads {FORMAT}")
    name, splits, limit = _text(value, "suite"), value["splits"], value.get("max_tokens")
    if "description" in value:
        _text(value, "description")
    if not isinstance(splits, dict) or not splits or not all(map(_is_text, splits.values())):
        _refuse("splits must be an object of names, each with a line that says what it is")
    if limit is not None and (type(limit) is not int or not 0 < limit < 2**31):
        _refuse(f"max_tokens is {_shown(limit)}; it must be an integer of 1 or more")
    tools = value.get("tools", {})
    if not isinstance(tools, dict):
        _refuse(f"tools is {_shown(tools)}; it must be an object of named lists")
    checked = {name: _tools(listed) for name, listed in tools.items()}
    suite = Suite(name, file, sha256, splits, limit or DEFAULT_MAX_TOKENS, ())
    return suite, checked


def _sample(value: dict[str, Any], line: int, suite: Suite, known: Mapping[str, Tools]) -> Sample:
    _check_keys(
        value, "id split skill expected", "messages prompt raw tools thinking schema target"
    )
    split, thinking = _text(value, "split"), value.get("thinking")
    if split not in suite.splits:
        _refuse(f"split is {split!r}; the header names {', '.join(suite.splits)}")
    if thinking is not None and not isinstance(thinking, bool):
        _refuse(f"thinking is {_shown(thinking)}; it must be true or false")
    messages, raw = _prompt(value)
    tools, schema = _sample_tools(value.get("tools", []), known), value.get("schema")
    if schema is not None:
        _check_schema(schema, "schema")
    content, calls = _expected(value["expected"], tools, schema)
    return Sample(
        line=line,
        id=_text(value, "id"),
        split=split,
        skill=_text(value, "skill"),
        messages=messages,
        raw=raw,
        tools=tools,
        thinking=thinking,
        schema=schema,
        content=content,
        calls=calls,
        target=_text(value, "target") if "target" in value else None,
    )


def _prompt(value: dict[str, Any]) -> tuple[tuple[Mapping[str, Any], ...], str | None]:
    """Messages, or the text to be continued."""
    raw = value.get("raw", False)
    if not isinstance(raw, bool):
        _refuse(f"raw is {_shown(raw)}; it must be true or false")
    if ("messages" in value) == ("prompt" in value):
        _refuse("a sample has either messages or a prompt")
    if "prompt" in value:
        text = _text(value, "prompt")
        return ((), text) if raw else (({"role": "user", "content": text},), None)
    if raw:
        _refuse("raw goes with a prompt, not with messages")
    messages = checked_messages(value["messages"])
    if messages[-1]["role"] not in ("user", "tool"):
        _refuse(f"the last message is the {messages[-1]['role']}'s; there is nothing to answer")
    return tuple(messages), None


def _expected(
    value: Any, tools: Tools, schema: Mapping[str, Any] | None
) -> tuple[str, tuple[ToolCall, ...]]:
    if not isinstance(value, dict) or not value:
        _refuse(f"expected is {_shown(value)}; it must be an object with content or tool_calls")
    _check_keys(value, "", "content tool_calls", "expected ")
    content, listed = value.get("content", ""), value.get("tool_calls", [])
    checked_text(content, "expected content")
    if not isinstance(listed, list):
        _refuse(f"expected tool_calls is {_shown(listed)}; it must be a list")
    calls = tuple(_call(call, tools) for call in listed)
    if schema is not None:
        fault = content_problem(content, schema)
        if fault:
            _refuse(f"expected content does not conform to the schema: {fault}")
    return content, calls


def content_problem(content: str, schema: Mapping[str, Any]) -> str | None:
    """What keeps a text from being JSON that conforms to a schema."""
    try:
        value = loads(content)
    except ValueError as error:
        return f"{content[:80]!r} is not JSON: {error}"
    return problem(value, schema)


def loads(text: str | bytes) -> Any:
    """JSON without its traps: no NaN, no key twice.

    Raises:
        ValueError: also for what is nested too deep.
    """
    try:
        return json.loads(text, parse_constant=no_constant, object_pairs_hook=unique_keys)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _call(value: Any, tools: Tools) -> ToolCall:
    if not isinstance(value, dict):
        _refuse(f"expected tool_calls holds {_shown(value)}; each must be an object")
    _check_keys(value, "name arguments", "", "expected call ")
    name, arguments = _text(value, "name"), value["arguments"]
    if parameters(name, tools) is None:
        _refuse(f"expected calls {name!r}, which is not one of the sample's tools")
    if not isinstance(arguments, dict):
        _refuse(f"expected call of {name!r}: arguments must be an object")
    call = ToolCall(name, arguments)
    fault = call_problem(call, tools)
    if fault:
        _refuse(f"expected call of {name!r} does not conform to the tool: {fault}")
    return call


def _sample_tools(value: Any, known: Mapping[str, Tools]) -> Tools:
    if not isinstance(value, str):
        return _tools(value)
    if value not in known:
        _refuse(f"tools is {value!r}; the header names {', '.join(known) or 'none'}")
    return known[value]


def _tools(value: Any) -> Tools:
    tools = tuple(checked_tools(value))
    for tool in tools:
        name = tool["function"]["name"]
        _check_schema(tool["function"].get("parameters") or {}, f"parameters of {name!r}")
    return tools


def _check_schema(schema: Any, what: str) -> None:
    from jsonschema import Draft202012Validator, SchemaError

    if not isinstance(schema, dict):
        _refuse(f"{what} is {_shown(schema)}; it must be a JSON schema, an object")
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        _refuse(f"{what} is no JSON schema: {error.message[:200]}")


def _object(line: bytes) -> dict[str, Any]:
    if not line.strip():
        _refuse("the line is empty; a suite has one JSON object a line")
    try:
        value = loads(line)
    except ValueError as error:  # UnicodeDecodeError is one
        _refuse(f"not JSON: {error}")
    if not isinstance(value, dict):
        _refuse(f"{_shown(value)} is not an object")
    return value


def _check_keys(value: Mapping[str, Any], needed: str, optional: str, where: str = "") -> None:
    required = needed.split()
    for key in required:
        if key not in value:
            _refuse(f"{where}{key} is missing")
    for key in value:
        if key not in (*required, *optional.split()):
            known = ", ".join((*required, *optional.split()))
            _refuse(f"{where}{_shown(key)} is unknown; there are {known}")


def _text(value: Mapping[str, Any], key: str) -> str:
    text = value[key]
    if not _is_text(text):
        _refuse(f"{key} is {_shown(text)}; it must be a string that is not empty")
    return checked_text(text, key)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _evenly(samples: list[Sample], limit: int | None) -> list[Sample]:
    if limit is None or len(samples) <= limit:
        return samples
    return [samples[index * len(samples) // limit] for index in range(limit)]


def _refuse(why: str) -> NoReturn:
    raise InvalidRequest(why)


def _shown(value: Any) -> str:
    return reprlib.repr(value)
