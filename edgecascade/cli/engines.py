# SPDX-License-Identifier: Apache-2.0
"""engine"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from edgecascade.cli.show import print_facts


def add(commands: Any) -> None:
    """The command and its options."""
    engine = commands.add_parser("engine", help="compile a bundle's TensorRT engine on this device")
    engine.add_argument("bundle")
    add_options(engine)
    engine.set_defaults(run=_engine)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `engine` and `build --engine` share."""
    parser.add_argument(
        "--builder",
        default="tensorrt",
        choices=("tensorrt", "rtx"),
        help="tensorrt, or rtx: TensorRT-RTX checks the graph on a PC, its plans run on no Jetson",
    )
    parser.add_argument(
        "--workspace-mb", type=int, default=1024, help="most memory that a plugin may work in"
    )


def _engine(args: argparse.Namespace) -> int:
    compile_engine(args.bundle, args)
    return 0


def compile_engine(path: str, args: argparse.Namespace) -> None:
    """Compile and store the engine of a bundle, with a bar while it takes."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from build_engine.compile import build_engine
    from edgecascade.bundle import Bundle
    from edgecascade.errors import InvalidRequest

    if args.workspace_mb < 1:
        raise InvalidRequest(f"--workspace-mb is {args.workspace_mb}; at least 1 is needed")
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with (
        Bundle.open(path) as bundle,
        Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar,
    ):
        task = bar.add_task("parsing the graph", total=None)
        made_at, made = build_engine(
            bundle,
            builder=args.builder,
            workspace_bytes=args.workspace_mb << 20,
            progress=lambda phase, step, steps: bar.update(
                task, description=phase, completed=step, total=steps
            ),
        )
    facts, accepted = made.facts, made.accepted
    proof = (
        f"{accepted.same} of {accepted.steps} tokens as the {accepted.against} backend's, "
        f"{accepted.ties} ties"
        if accepted
        else "not run: a TensorRT-RTX plan checks the graph, no Jetson runs it"
    )
    print_facts(
        {
            "engine": str(made_at),
            "built": f"{facts['parse_s'] + facts['build_s']:.1f} s for {facts['layers']} layers"
            + (", with a timing cache" if facts["from_timing_cache"] else ""),
            "plan": f"{facts['plan_bytes'] / 1e6:.1f} MB",
            "memory": f"{facts['peak_rss_bytes'] / 1e6:.0f} MB at most",
            "tokens": proof,
        }
    )
