# SPDX-License-Identifier: Apache-2.0
"""bench · doctor"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from edgecascade.cli.options import add_backend, at_least_two, positive
from edgecascade.cli.show import gigabytes, print_facts, print_json
from edgecascade.errors import InvalidRequest


def add(commands: Any) -> None:
    """The commands and their options."""
    bench = commands.add_parser("bench", help="measure load, prefill and decode")
    source = bench.add_mutually_exclusive_group(required=True)
    source.add_argument("bundle", nargs="?")
    source.add_argument(
        "--synthetic", metavar="MODEL", help="a real model's shapes, random weights"
    )
    bench.add_argument("--layers", type=int, help="of the synthetic model; all by default")
    bench.add_argument("--precision", help="of the synthetic model; speed by default")
    bench.add_argument("--prompt-tokens", type=positive, default=512)
    bench.add_argument("--decode-tokens", type=at_least_two, default=64)
    bench.add_argument("--repeats", type=positive, default=3)
    bench.add_argument("--json", action="store_true")
    add_backend(bench)
    bench.set_defaults(run=_bench)

    doctor = commands.add_parser("doctor", help="what this machine offers")
    doctor.add_argument("--json", action="store_true")
    doctor.add_argument(
        "--engine",
        action="store_true",
        help="build a small TensorRT engine, run it, compare it, and print a report to send",
    )
    doctor.set_defaults(run=_doctor)


def _bench(args: argparse.Namespace) -> int:
    from edgecascade.bench import bench

    for name in ("layers", "precision"):
        if args.synthetic is None and getattr(args, name) is not None:
            raise InvalidRequest(
                f"--{name} is of --synthetic; {args.bundle} has its own: leave it out"
            )
    result = bench(
        _synthetic(args) if args.synthetic else args.bundle,
        backend=args.backend,
        threads=args.threads,
        max_context=args.max_context,
        kv=args.kv,
        prompt_tokens=args.prompt_tokens,
        decode_tokens=args.decode_tokens,
        repeats=args.repeats,
    )
    if args.json:
        print_json(result)
        return 0
    r = result
    facts = {
        "machine": f"{r['processor']}, {r['cores']} cores, {r['date']}",
        "bundle": f"{r['parameters'] / 1e9:.3g} B parameters, {r['precision']}, "
        f"{r['weight_bytes'] / 1e9:.2f} GB, backend {r['backend']}, {r['threads']} threads",
        "load": f"{r['load_s']:.2f} s; to the first token {r['load_to_first_token_s']:.2f} s",
        "prefill": f"{r['prefill_tokens_per_s']:.1f} tokens/s, {r['prompt_tokens']} tokens",
        "decode": f"{r['decode_tokens_per_s']:.2f} tokens/s, {r['decode_tokens']} tokens",
        "reads": f"{r['bytes_per_token'] / 1e6:,.1f} MB a token",
        "peak memory": f"{r['peak_rss_bytes'] / 1e9:.2f} GB",
    }
    if r["read_bytes_per_s"]:
        facts["roofline"] = (
            f"{r['share_of_roofline']:.0%} of {r['read_bytes_per_s'] / 1e9:.1f} GB/s measured"
        )
    print_facts(facts)
    return 0


def _synthetic(args: argparse.Namespace) -> str:
    """A bundle of a real model's shapes, written once into the user's cache folder."""
    from build_engine.synthetic import cached, config, write_synthetic
    from edgecascade.bundle import Bundle
    from edgecascade.errors import BundleError

    precision = args.precision or "speed"
    path = cached(args.synthetic, args.layers, precision)
    try:
        Bundle.open(path).close()
    except BundleError:  # not there yet, or of an older format
        config(args.synthetic, args.layers)  # refuses what it does not know
        print(f"writing {path}", file=sys.stderr)
        write_synthetic(
            path, args.synthetic, args.layers, precision=precision, overwrite=path.exists()
        )
    return str(path)


def _doctor(args: argparse.Namespace) -> int:
    from edgecascade.doctor import examine

    found = examine()
    if args.engine:
        from build_engine.prove import prove

        found["engine"] = prove()
        print_json(found)
        return 1 if found["engine"]["error"] else 0
    if args.json:
        print_json(found)
        return 0
    library = found["library"]
    facts = {
        "edgecascade": f"{found['version']}, Python {found['python']}, {found['platform']}",
        "processor": f"{found['processor']}, {found['cores']} cores",
        "memory": f"{gigabytes(found['memory_bytes'])}, "
        f"{gigabytes(found['available_bytes'])} available",
        "library": library.get("problem") or f"{library['path']}, ABI {library['abi']}",
    }
    if "problem" not in library:
        facts["kernels"] = (
            f"{library['isa']} of {', '.join(library['isas'])}; {library['threads']} threads read "
            f"{library['read_bytes_per_s'] / 1e9:.1f} GB/s"
        )
    facts |= {"gpu": found["gpu"], "tensorrt": found["tensorrt"]}
    device = found["device"]
    known = ((name, device.get(name)) for name in ("model", "module", "l4t", "jetpack"))
    words = ", ".join(f"{name} {value}" for name, value in known if value)
    facts["jetson"] = words or "this is not a Jetson"
    print_facts(facts)
    return 1 if "problem" in library else 0
