# SPDX-License-Identifier: Apache-2.0
"""generate · chat"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from edgecascade.cli.options import (
    add_backend,
    add_conversation,
    add_sampling,
    load,
    numbers,
    read_tools,
    sampling_params,
)
from edgecascade.cli.show import print_error, print_json, show
from edgecascade.errors import InvalidRequest

if TYPE_CHECKING:
    from edgecascade.sampling import SamplingParams
    from edgecascade.session import Session
    from edgecascade.text.tools import ToolCall

Said = str | list[dict[str, Any]]  # a user's text, or the results of tools


def add(commands: Any) -> None:
    """The commands and their options."""
    generate = commands.add_parser("generate", help="answer one prompt")
    generate.add_argument("bundle")
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="a text; - reads it from stdin")
    prompt.add_argument("--token-ids", help="numbers with commas between them")
    add_conversation(generate)
    generate.add_argument("--raw", action="store_true", help="continue the text, no chat template")
    generate.add_argument("--json", action="store_true", help="the whole completion as JSON")
    add_sampling(generate)
    add_backend(generate)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk to a bundle")
    chat.add_argument("bundle")
    add_conversation(chat)
    add_sampling(chat)
    add_backend(chat)
    chat.set_defaults(run=_chat)


def _generate(args: argparse.Namespace) -> int:
    options: dict[str, Any] = {
        "params": sampling_params(args),
        "tools": read_tools(args),
        "raw": args.raw,
    }
    if args.system is not None and (args.raw or args.token_ids is not None):
        what = "--raw" if args.raw else "--token-ids"
        raise InvalidRequest(f"{what} goes to the model as it is; leave out --system, or {what}")
    if args.token_ids is not None:
        options["prompt"] = numbers(args.token_ids)
    else:
        text = sys.stdin.buffer.read() if args.prompt == "-" else args.prompt
        if args.system is None:
            options["prompt"] = text
        else:
            options["messages"] = [
                {"role": "system", "content": args.system},
                {"role": "user", "content": text},
            ]
    with load(args) as llm:
        if args.json:
            print_json(llm.generate(**options).to_dict())
            return 0
        show(llm.stream(**options))
    return 0


def _chat(args: argparse.Namespace) -> int:
    params, tools = sampling_params(args), read_tools(args)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are not UTF-8 become an error of that turn, not of the program.
        sys.stdin.reconfigure(errors="surrogateescape")
    status = 0
    with load(args) as llm:
        session = llm.session(args.system, tools)
        print("Ctrl-C stops an answer, Ctrl-D ends the chat.", file=sys.stderr)
        with suppress(EOFError):
            while True:
                said: Said = _line("> ")
                while said:
                    failed, calls = _turn(session, said, params)
                    status, said = failed or status, _results(calls)
    return status


def _line(prompt: str) -> str:
    """A line of the user's, without white space around it."""
    return input(prompt if sys.stdin.isatty() else "").strip()


def _results(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """What the called tools gave, if the user wants to say it: an empty line ends the asking."""
    results = []
    for call in calls:
        if not (text := _line(f"{call.name}: ")):
            return []
        results.append({"role": "tool", "content": text})
    return results


def _turn(session: Session, said: Said, params: SamplingParams) -> tuple[int, Sequence[ToolCall]]:
    """One turn: its status, and what was called. What is wrong with it does not end the chat."""
    try:
        with closing(session.stream(said, params=params)) as stream:
            answer = show(stream)
    except KeyboardInterrupt:
        print("\n(stopped; this turn is forgotten)", file=sys.stderr)
        return 0, ()
    except InvalidRequest as error:
        print_error(error)
        return 1, ()
    return 0, answer.tool_calls
