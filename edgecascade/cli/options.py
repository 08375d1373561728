# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and what they mean."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from edgecascade.errors import InvalidRequest

if TYPE_CHECKING:
    from edgecascade.llm import LLM
    from edgecascade.sampling import SamplingParams

MAX_TOOLS_BYTES = 4 << 20


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """What may be asked of a generation."""
    group = parser.add_argument_group("sampling", "what is not given is as the bundle recommends")
    group.add_argument("--max-tokens", type=int)
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument("--top-p", type=float)
    group.add_argument("--top-k", type=int)
    group.add_argument("--min-p", type=float)
    group.add_argument("--seed", type=int)
    group.add_argument("--stop", action="append", default=[], help="may be given several times")
    group.add_argument("--no-thinking", dest="thinking", action="store_false", default=None)
    group.add_argument("--thinking-budget", type=int, metavar="TOKENS")


def add_backend(parser: argparse.ArgumentParser) -> None:
    """What a bundle is loaded with."""
    parser.add_argument("--backend", default="auto", help="auto, tensorrt, cuda, cpu or reference")
    parser.add_argument("--threads", type=int, help="as many as the memory can feed by default")
    parser.add_argument("--max-context", type=int, help="tokens of a prompt and its answer")
    parser.add_argument("--kv", help="keys and values as f32, f16 or int8; the bundle's by default")


def add_conversation(parser: argparse.ArgumentParser) -> None:
    """What the model is told beside the prompt."""
    parser.add_argument("--system", help="the system's message")
    parser.add_argument("--tools", metavar="FILE", help="JSON list of the tools it may call")


def read_tools(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """The tools of --tools, in the form of OpenAI's API."""
    from edgecascade.text.tools import checked_tools

    if args.tools is None:
        return None
    try:
        with open(args.tools, "rb") as file:
            data = file.read(MAX_TOOLS_BYTES + 1)
        if len(data) > MAX_TOOLS_BYTES:
            raise InvalidRequest(f"it is larger than {MAX_TOOLS_BYTES >> 20} MiB")
        return checked_tools(json.loads(data))
    except (OSError, ValueError, RecursionError) as error:  # InvalidRequest is a ValueError
        raise InvalidRequest(f"--tools {args.tools}: {error}; give a JSON list of tools") from error


def load(args: argparse.Namespace, bundle: str | None = None, **options: Any) -> LLM:
    """The bundle of the command, or another one, as the options of add_backend() say."""
    from edgecascade.llm import LLM

    return LLM.load(
        bundle or args.bundle,
        args.backend,
        threads=args.threads,
        max_context=args.max_context,
        kv=args.kv,
        **options,
    )


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """What add_sampling() read."""
    from edgecascade.sampling import SamplingParams

    return SamplingParams(
        **{name: getattr(args, name) for name in SamplingParams.names() if hasattr(args, name)}
    )


def numbers(text: str) -> list[int]:
    """Token ids as they are written on a command line."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidRequest(f"--token-ids is {text!r}; write numbers as in 1,2,3") from error


def natural(text: str) -> int:
    """A whole number of 0 or more."""
    return _at_least(text, 0)


def within(low: float, high: float) -> Callable[[str], float]:
    """A number in these bounds."""

    def number(text: str) -> float:
        with suppress(ValueError):
            if low <= (value := float(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {low:.0f} to {high:.0f}")

    return number


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    return _at_least(text, 1)


def at_least_two(text: str) -> int:
    """A whole number of 2 or more."""
    return _at_least(text, 2)


def _at_least(text: str, low: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {low} or more")
    return int(text)
