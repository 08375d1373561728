# SPDX-License-Identifier: Apache-2.0
"""How results look: answers to stdout, what is about them to stderr."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgecascade.completion import Completion, Piece
    from edgecascade.errors import EdgeCascadeError

# All but tabs and line breaks: what would move the cursor, name the window or fill the clipboard.
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")


def plain(text: str) -> str:
    """Words of a model, a device or a file as a terminal may show them."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


class PlainFormatter(logging.Formatter):
    """A log may quote a broker or a server."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging."""
        return plain(super().format(record))


class Talk:
    """An answer as it comes: text and calls on stdout, the rest on stderr, dimmed. On a terminal
    they share the screen, so each begins on a line of its own, and no text is a command to it;
    elsewhere they stay as they are.
    """

    def __init__(self) -> None:
        self._dim, self._plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
        self._out = plain if sys.stdout.isatty() else str
        self._err = plain if sys.stderr.isatty() else str
        self._reasons = self._within_line = self._called = False

    def add(self, reasoning: str = "", text: str = "", calls: Sequence[object] = ()) -> None:
        """What has come."""
        if reasoning:
            self._reasons = True
            print(
                f"{self._dim}{self._err(reasoning)}{self._plain}",
                end="",
                file=sys.stderr,
                flush=True,
            )
        if text or calls:
            self._end_reasoning()
        if text:
            print(self._out(text), end="", flush=True)
            self._within_line = not text.endswith("\n")
        if calls:
            self._end_line()
            print(*(self._out(str(call)) for call in calls), sep="\n", flush=True)
            self._called = True

    def begin_anew(self, why: str) -> None:
        """What was shown is void; it cannot be taken back, but what comes is not joined to it."""
        self._end_reasoning()
        self._end_line()
        self._called = False
        print(f"({why})", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Nothing more comes; an answer without text is an empty line."""
        self._end_reasoning()
        if self._within_line or not self._called:
            print(flush=True)

    def figures(self, text: str) -> None:
        """What the answer took."""
        print(f"{self._dim}[{self._err(text)}]{self._plain}", file=sys.stderr)

    def _end_reasoning(self) -> None:
        if self._reasons:
            print(file=sys.stderr, flush=True)
        self._reasons = False

    def _end_line(self) -> None:
        if self._within_line:
            print(flush=True)
        self._within_line = False


def show(pieces: Iterable[Piece]) -> Completion:
    """Stream the answer to stdout, the reasoning and the figures to stderr; the whole of it."""
    talk = Talk()
    completion: Completion | None = None
    for piece in pieces:
        talk.add(piece.reasoning, piece.text, piece.tool_calls)
        completion = piece.completion
    assert completion is not None  # the last piece carries it
    talk.end()
    usage, times = completion.usage, completion.timings
    talk.figures(
        f"{usage.prompt_tokens} tokens read, {usage.cached_tokens} of them kept; first "
        f"token after {times.first_token_s:.2f} s; {usage.completion_tokens} tokens made, "
        f"{times.decode_tokens_per_s:.1f}/s; {completion.finish_reason}; seed {completion.seed}"
    )
    for error in completion.tool_errors:
        print(f"a call that cannot be read: {plain(error)}", file=sys.stderr)
    return completion


def print_json(value: Any) -> None:
    """One JSON document, with every control character as an escape."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print(re.sub(r"[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text))


def print_error(error: EdgeCascadeError) -> None:
    """One line, whatever a parser put into the message."""
    message = " ".join(line.strip() for line in str(error).splitlines())
    print(f"error [{error.code}]: {plain(message)}", file=sys.stderr)


def print_facts(facts: dict[str, str]) -> None:
    """Names and values in two columns."""
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {plain(value)}")


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
