# SPDX-License-Identifier: Apache-2.0
"""How results look: answers to stdout, what is about them to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgecascade.completion import Completion, Piece


def show(pieces: Iterable[Piece]) -> Completion:
    """Stream the answer to stdout, the reasoning and the figures to stderr; the whole of it."""
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    completion: Completion | None = None
    reasoning = within_line = False
    for piece in pieces:
        if piece.reasoning:
            reasoning = True
            print(f"{dim}{piece.reasoning}{plain}", end="", file=sys.stderr, flush=True)
        if reasoning and (piece.text or piece.tool_calls or piece.finish_reason):
            reasoning = False
            print(file=sys.stderr, flush=True)
        if piece.text:
            print(piece.text, end="", flush=True)
            within_line = not piece.text.endswith("\n")
        if piece.tool_calls:
            print("\n" * within_line, end="")
            print(*piece.tool_calls, sep="\n", flush=True)
            within_line = False
        completion = piece.completion
    assert completion is not None  # the last piece carries it
    if within_line or not completion.tool_calls:
        print(flush=True)
    usage, times = completion.usage, completion.timings
    print(
        f"{dim}[{usage.prompt_tokens} tokens read, {usage.cached_tokens} of them kept; first "
        f"token after {times.first_token_s:.2f} s; {usage.completion_tokens} tokens made, "
        f"{times.decode_tokens_per_s:.1f}/s; {completion.finish_reason}; "
        f"seed {completion.seed}]{plain}",
        file=sys.stderr,
    )
    for error in completion.tool_errors:
        print(f"a call that cannot be read: {error}", file=sys.stderr)
    return completion


def print_json(value: Any) -> None:
    """One JSON document."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_facts(facts: dict[str, str]) -> None:
    """Names and values in two columns."""
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def print_tables(tables: Iterable[Any]) -> None:
    """Tables of rich."""
    from rich.console import Console

    # Wide enough for every column where the output is a file or a pipe.
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in tables:
        console.print(table)


def gigabytes(size: int | None) -> str:
    """A size in words."""
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"
