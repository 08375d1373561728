# SPDX-License-Identifier: Apache-2.0
"""Jinja as transformers sets it up for chat templates: sandbox, tags, filters and functions."""

from __future__ import annotations

import datetime
import json
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What a template's own expressions raise.
FAILURES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class TemplateRefusal(Exception):
    """The template itself called raise_exception."""


class _Generation(Extension):
    """{% generation %} marks what trainers learn from; whoever asks for an answer reads past it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def compiled(source: str, what: str) -> Template:
    """A chat template; `what` names it in messages.

    Raises:
        ValueError: saying why it is none.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ValueError(f"{what}, line {error.lineno}: {error.message}") from error
    # Constants are computed here, and Python compiles what Jinja wrote: a {% break %} of no loop.
    except (*FAILURES, SyntaxError) as error:
        raise ValueError(f"{what} cannot be compiled: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes < and > for HTML; a model must see them as they are. Templates give
    # arguments by place, too, so their order is transformers'.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    raise TemplateRefusal(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
