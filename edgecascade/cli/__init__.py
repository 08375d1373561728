# SPDX-License-Identifier: Apache-2.0
"""The command line: one module for each group of commands. Only this package prints.

build · inspect · engine · generate · chat · bench · doctor · eval · serve · ask · broker-config
unit · agent · fleet · faults
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from edgecascade.cli import agent, bundles, engines, evaluate, faults, fleet, measure, mqtt, talk
from edgecascade.cli.show import PlainFormatter, print_error
from edgecascade.errors import EdgeCascadeError

DEBUG = "EDGECASCADE_DEBUG"
INTERRUPTED, PIPE_CLOSED = 128 + signal.SIGINT, 128 + signal.SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    _open_what_is_closed()
    args = build_parser().parse_args(argv)
    level = logging.INFO if args.verbose else logging.WARNING
    told = logging.StreamHandler(sys.stderr)
    told.setFormatter(PlainFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[told])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character must not end a generation.
            stream.reconfigure(errors="replace")
    try:
        command: Callable[[argparse.Namespace], int] = args.run
        status = command(args)
        sys.stdout.flush()
        return status
    except EdgeCascadeError as error:
        if os.environ.get(DEBUG):
            raise
        print_error(error)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone
        _drop_output()
        return PIPE_CLOSED
    except OSError as error:  # such as a full disk behind stdout
        if os.environ.get(DEBUG):
            raise
        print(f"error [os]: {error}", file=sys.stderr)
        _drop_output()
        return 1


def _open_what_is_closed() -> None:
    """A stream that whoever started us has closed (2>&-) is None: it leads nowhere instead, and its
    number goes to no other file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  open until the process ends


def _drop_output() -> None:
    """What stdout still holds goes nowhere, or the interpreter fails again when it flushes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="edgecascade", description="Run Nemotron-H language models on Jetson and CPU."
    )
    parser.add_argument("--version", action=_Version)
    parser.add_argument("-v", "--verbose", action="store_true", help="say what happens on stderr")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for module in (agent, bundles, engines, talk, measure, evaluate, mqtt, faults, fleet):
        module.add(commands)
    return parser


class _Version(argparse.Action):
    """Prints the version; the package's metadata are only read when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from edgecascade.version import package_version

        print(f"edgecascade {package_version()}")
        parser.exit()
