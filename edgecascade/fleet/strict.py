# SPDX-License-Identifier: Apache-2.0
"""JSON documents as frozen dataclasses: every key known, every type exact, every size bounded.

A dataclass says what may be in a document: its annotations are the types, its `__post_init__` the
ranges, given as ValueError. Types may be str, bool, int, float, dict, Literal, tuple[T, ...],
`T | None` and dataclasses of these.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from edgecascade.service import wire

T = TypeVar("T")
Reader = Callable[[Any, str], Any]  # value, its place in the document


class BadDocument(ValueError):
    """A document is not what its dataclass says; the message names the place."""


def parse(
    kind: type[T], data: bytes, what: str, *, schema: int, limit: int, defaults: bool = False
) -> T:
    """The document in the bytes: an object with a `schema` and the dataclass's keys; see `read`.

    Raises:
        BadDocument: for anything else, or more than `limit` bytes.
    """
    if len(data) > limit:
        raise BadDocument(f"{what} has {len(data)} bytes; at most {limit} are read")
    raw = json_object(data, what)
    found = raw.pop("schema", None)
    if found != schema or type(found) is not int:
        raise BadDocument(f"{what} has schema {found!r}, this version reads {schema}")
    return read(kind, raw, what, defaults=defaults)


def json_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in the bytes.

    Raises:
        BadDocument: for anything else.
    """
    try:
        raw = wire.decode(data)
    except wire.BadJson as error:
        raise BadDocument(f"{what} is {error}") from None
    if not isinstance(raw, dict):
        raise BadDocument(f"{what} is {type(raw).__name__}; expected an object")
    return raw


def read(kind: type[T], value: Any, what: str, *, defaults: bool = False) -> T:
    """A value from JSON as `kind`; with `defaults`, keys that have one may be left out.

    Raises:
        BadDocument: naming the place.
    """
    made: T = _reader(cast("Hashable", kind), defaults)(value, what)
    return made


@lru_cache(maxsize=256)
def _reader(kind: Any, defaults: bool) -> Reader:
    """What reads a value of this kind: the annotations are looked at once, not at each document."""
    if is_dataclass(kind):
        return _object_reader(kind, defaults)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = _reader(next(each for each in arguments if each is not type(None)), defaults)
        return lambda value, what: None if value is None else inner(value, what)
    if origin is tuple:
        return _tuple_reader(_reader(arguments[0], defaults))
    if origin is Literal:
        return _literal_reader(arguments)
    return _plain_reader(origin or kind)


def _plain_reader(expected: Any) -> Reader:
    def plain(value: Any, what: str) -> Any:
        if type(value) is expected:
            return value
        if expected is float and type(value) is int:
            return float(value)
        raise BadDocument(f"{what} is {value!r:.60}; expected {expected.__name__}")

    return plain


def _literal_reader(words: tuple[str, ...]) -> Reader:
    def literal(value: Any, what: str) -> Any:
        if type(value) is not str or value not in words:
            raise BadDocument(f"{what} is {value!r:.60}; expected one of {', '.join(words)}")
        return value

    return literal


def _tuple_reader(inner: Reader) -> Reader:
    def every(value: Any, what: str) -> Any:
        if not isinstance(value, list):
            raise BadDocument(f"{what} is {value!r:.60}; expected a list")
        return tuple(inner(each, f"{what}[{i}]") for i, each in enumerate(value))

    return every


def _object_reader(kind: Any, defaults: bool) -> Reader:
    hints = get_type_hints(kind)
    readers = {field.name: _reader(hints[field.name], defaults) for field in fields(kind)}
    needed = {field.name for field in fields(kind) if not (defaults and _has_default(field))}

    def whole(value: Any, what: str) -> Any:
        if not isinstance(value, dict):
            raise BadDocument(f"{what} is {value!r:.60}; expected an object")
        missing, unknown = needed - value.keys(), value.keys() - readers.keys()
        if missing or unknown:
            raise BadDocument(
                f"{what}: unknown keys {sorted(unknown)}, missing keys {sorted(missing)}"
            )
        read_fields = {name: readers[name](each, f"{what}.{name}") for name, each in value.items()}
        try:
            return kind(**read_fields)
        except BadDocument:
            raise
        except ValueError as error:
            raise BadDocument(f"{what}: {error}") from None

    return whole


def _has_default(field: Any) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING
