# SPDX-License-Identifier: Apache-2.0
"""faults: what the update machinery survives on this machine, counted."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecascade.errors import InvalidRequest

if TYPE_CHECKING:
    from edgecascade.fleet.faults.runner import Result

SHOWN = 5  # failures of a class


def add(commands: Any) -> None:
    """The command and its options."""
    faults = commands.add_parser(
        "faults", help="power cuts, kills, bad disks, bad networks: what updates survive"
    )
    faults.add_argument("--class", dest="classes", action="append", default=[], metavar="F1")
    faults.add_argument("--seed", type=int, default=1)
    faults.add_argument("--short", action="store_true", help="fewer of each, in under a minute")
    faults.add_argument("--case", help="only this one, as a failure names it")
    faults.add_argument("--json", metavar="FILE", help="results, with what repeats each failure")
    faults.add_argument("--list", action="store_true", help="the classes and their counts")
    faults.set_defaults(run=_faults)


def _faults(args: argparse.Namespace) -> int:
    from edgecascade.fleet.faults import CLASSES, load
    from edgecascade.fleet.faults.runner import (
        chosen,
        closing_line,
        run_class,
        run_classes,
        to_json,
    )

    names = chosen(args.classes)
    if args.list:
        for name in names:
            module = load(name)
            print(f"{name:<4} {module.FULL:>7,}  {module.TITLE}")
        return 0
    if args.case is not None and len(args.classes) != 1:
        raise InvalidRequest(f"--case {args.case} needs its --class, one of {', '.join(CLASSES)}")
    results: list[Result] = []
    if len(names) == 1:
        # What a fault makes the device log is no news here, unless it is asked for.
        if not args.verbose:
            logging.disable(logging.CRITICAL)
        results.append(run_class(names[0], args.seed, short=args.short, case=args.case))
        _show(results[-1], args.short)
    else:
        for result in run_classes(names, args.seed, short=args.short):
            results.append(result)
            _show(result, args.short)
    if args.json:
        document = to_json(results, args.seed, short=args.short)
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(document, indent=1) + "\n")
    print(closing_line(results))
    return 1 if any(result.outcome.failures for result in results) else 0


def _show(result: Result, short: bool) -> None:
    from edgecascade.fleet.faults.runner import WHOLE

    outcome = result.outcome
    if outcome.skipped:
        print(f"{result.name:<4} {'skipped':>15}  {result.title}: {outcome.skipped}", flush=True)
        return
    count = f"{result.survived:,}/{max(outcome.tried, len(outcome.failures)):,}"
    print(f"{result.name:<4} {count:>15}  {result.title}  ({result.seconds:.0f} s)", flush=True)
    for failure in outcome.failures[:SHOWN]:
        print(f"     {failure.message}", file=sys.stderr)
        again = f"--class {result.name} --seed {result.seed}{' --short' if short else ''}"
        case = "" if failure.case == WHOLE else f" --case {failure.case}"
        print(f"     again: edgecascade faults {again}{case}", file=sys.stderr)
    more = len(outcome.failures) - SHOWN
    if more > 0:
        print(f"     and {more} more", file=sys.stderr)
