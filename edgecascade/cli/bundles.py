# SPDX-License-Identifier: Apache-2.0
"""build · inspect"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from edgecascade.cli.engines import add_options, compile_engine
from edgecascade.cli.show import print_facts, print_json, print_tables


def add(commands: Any) -> None:
    """The commands and their options."""
    build = commands.add_parser("build", help="make a bundle from a Hugging Face checkpoint")
    build.add_argument("checkpoint", help="folder with config.json and safetensors")
    build.add_argument("--out", required=True, help="the bundle to write")
    build.add_argument("--precision", default="speed", help="exact, quality, balanced or speed")
    build.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    build.add_argument("--no-verify", action="store_true", help="do not run the built bundle")
    build.add_argument("--engine", action="store_true", help="compile its TensorRT engine too")
    add_options(build)
    build.set_defaults(run=_build)

    inspect = commands.add_parser("inspect", help="what is in a bundle and where it fits")
    inspect.add_argument("bundle")
    inspect.add_argument("--verify", action="store_true", help="hash every file, whatever is known")
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(run=_inspect)


def _build(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from build_engine.pipeline import build

    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("packing", total=None)
        report = build(
            args.checkpoint,
            args.out,
            precision=args.precision,
            overwrite=args.overwrite,
            verify=not args.no_verify,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(
        f"{args.out}: {report.source_bytes / 1e6:,.1f} MB became "
        f"{report.stored_bytes / 1e6:,.1f} MB ({report.precision}); "
        f"packed in {report.pack_s:.1f} s, verified in {report.verify_s:.1f} s"
    )
    if args.engine:
        compile_engine(args.out, args)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from edgecascade.bundle import Bundle
    from edgecascade.inspect import describe, tables

    with Bundle.open(args.bundle, verify=True if args.verify else None) as bundle:
        description = describe(bundle)
    if args.json:
        print_json(description)
        return 0
    d = description
    print_facts(
        {
            "bundle": d["path"],
            "id": d["id"],
            "model": f"{d['family']}, precision {d['precision']}",
            "context": f"{d['max_context']:,} tokens, keys and values {d['kv_type']}",
            "state": f"{d['state_bytes_per_session'] / 1e6:,.2f} MB a session, "
            f"{d['state_bytes_per_token']:,} bytes a token",
        }
    )
    print_tables(tables(description))
    return 0
