# SPDX-License-Identifier: Apache-2.0
"""generate · chat"""

from __future__ import annotations

import argparse
import io
import sys
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
from edgecascade.cli.show import print_json, show
from edgecascade.errors import InvalidRequest

if TYPE_CHECKING:
    from edgecascade.sampling import SamplingParams
    from edgecascade.session import Session


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
        while True:
            try:
                text = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return status
            if text.strip():
                status = _turn(session, text, params) or status


def _turn(session: Session, text: str, params: SamplingParams) -> int:
    """One turn of a chat. What is wrong with it does not end the conversation."""
    try:
        stream = session.stream(text, params=params)
        try:
            show(stream)
        finally:
            stream.close()
    except KeyboardInterrupt:
        print("\n(stopped; this turn is forgotten)", file=sys.stderr)
    except InvalidRequest as error:
        print(f"error [{error.code}]: {error}", file=sys.stderr)
        return 1
    return 0
