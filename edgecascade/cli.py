# SPDX-License-Identifier: Apache-2.0
"""The command line. Only this file prints.

build · inspect · generate · chat · bench · doctor · serve · ask · broker-config · unit
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgecascade.errors import EdgeCascadeError, InvalidRequest

if TYPE_CHECKING:
    from edgecascade.completion import Completion, Piece
    from edgecascade.llm import LLM
    from edgecascade.sampling import SamplingParams
    from edgecascade.session import Session

DEBUG = "EDGECASCADE_DEBUG"
INTERRUPTED, PIPE_CLOSED = 128 + signal.SIGINT, 128 + signal.SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    args = build_parser().parse_args(argv)
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
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
        print(f"error [{error.code}]: {error}", file=sys.stderr)
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

    build = commands.add_parser("build", help="make a bundle from a Hugging Face checkpoint")
    build.add_argument("checkpoint", help="folder with config.json and safetensors")
    build.add_argument("--out", required=True, help="the bundle to write")
    build.add_argument("--precision", default="speed", help="exact, quality, balanced or speed")
    build.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    build.add_argument("--no-verify", action="store_true", help="do not run the built bundle")
    build.set_defaults(run=_build)

    inspect = commands.add_parser("inspect", help="what is in a bundle and where it fits")
    inspect.add_argument("bundle")
    inspect.add_argument("--verify", action="store_true", help="hash every file, whatever is known")
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(run=_inspect)

    generate = commands.add_parser("generate", help="answer one prompt")
    generate.add_argument("bundle")
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="a text; - reads it from stdin")
    prompt.add_argument("--token-ids", help="numbers with commas between them")
    generate.add_argument("--system", help="the system's message")
    generate.add_argument("--raw", action="store_true", help="continue the text, no chat template")
    generate.add_argument("--json", action="store_true", help="the whole completion as JSON")
    _add_sampling(generate)
    _add_backend(generate)
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk to a bundle")
    chat.add_argument("bundle")
    chat.add_argument("--system", help="the system's message")
    _add_sampling(chat)
    _add_backend(chat)
    chat.set_defaults(run=_chat)

    bench = commands.add_parser("bench", help="measure load, prefill and decode")
    source = bench.add_mutually_exclusive_group(required=True)
    source.add_argument("bundle", nargs="?")
    source.add_argument(
        "--synthetic", metavar="MODEL", help="a real model's shapes, random weights"
    )
    bench.add_argument("--layers", type=int, help="of the synthetic model; all by default")
    bench.add_argument("--precision", default="speed", help="of the synthetic model")
    bench.add_argument("--prompt-tokens", type=_positive, default=512)
    bench.add_argument("--decode-tokens", type=_at_least_two, default=64)
    bench.add_argument("--repeats", type=_positive, default=3)
    bench.add_argument("--json", action="store_true")
    _add_backend(bench)
    bench.set_defaults(run=_bench)

    doctor = commands.add_parser("doctor", help="what this machine offers")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)
    _add_mqtt(commands)
    return parser


def _add_mqtt(commands: Any) -> None:
    from edgecascade.service.config import add_options

    serve = commands.add_parser("serve", help="answer requests over MQTT")
    serve.add_argument("bundle")
    serve.add_argument("--slots", type=_positive, default=8, help="requests that run side by side")
    serve.add_argument("--max-queue", type=_positive, default=64, help="requests that may wait")
    add_options(serve)
    _add_backend(serve)
    serve.set_defaults(run=_serve)

    ask = commands.add_parser("ask", help="ask a device over MQTT")
    ask.add_argument("text", help="what to ask; - reads it from stdin")
    ask.add_argument("--mqtt", required=True, metavar="URL", help="the broker")
    ask.add_argument("--device", help="by default any that accepts requests")
    ask.add_argument("--system", help="the system's message")
    ask.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS")
    ask.add_argument("--json", action="store_true", help="the whole answer as JSON")
    for name in ("client-id", "prefix", "username", "ca", "cert", "key"):
        ask.add_argument(f"--{name}")
    _add_sampling(ask)
    ask.set_defaults(run=_ask)

    broker = commands.add_parser("broker-config", help="print a Mosquitto configuration")
    broker.add_argument("--acl", action="store_true", help="print the access list instead")
    broker.add_argument("--prefix", help="first levels of all topics")
    broker.add_argument("--port", type=_positive, default=8883)
    broker.add_argument("--folder", help="where certificates and the access list are")
    broker.add_argument("--passwords", action="store_true", help="instead of certificates")
    broker.add_argument("--operator", action="append", metavar="NAME", help="may do everything")
    broker.add_argument("--pool", action="append", default=[], metavar="NAME=DEVICE,DEVICE")
    broker.set_defaults(run=_broker_config)

    unit = commands.add_parser("unit", help="print a systemd unit that serves a bundle")
    unit.add_argument("bundle")
    unit.add_argument("--config", required=True, metavar="FILE", help="of serve")
    unit.add_argument("--user", default="edgecascade")
    unit.set_defaults(run=_unit)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
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


def _add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="auto", help="auto, cpu or reference")
    parser.add_argument("--threads", type=int, help="as many as the memory can feed by default")
    parser.add_argument("--max-context", type=int, help="tokens of a prompt and its answer")


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
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from edgecascade.bundle import Bundle
    from edgecascade.inspect import describe, tables

    with Bundle.open(args.bundle, verify=True if args.verify else None) as bundle:
        description = describe(bundle)
    if args.json:
        _print_json(description)
        return 0
    d = description
    _print_facts(
        {
            "bundle": d["path"],
            "id": d["id"],
            "model": f"{d['family']}, precision {d['precision']}",
            "context": f"{d['max_context']:,} tokens, keys and values {d['kv_type']}",
            "state": f"{d['state_bytes_per_session'] / 1e6:,.2f} MB a session, "
            f"{d['state_bytes_per_token']:,} bytes a token",
        }
    )
    _print_tables(tables(description))
    return 0


def _generate(args: argparse.Namespace) -> int:
    options: dict[str, Any] = {"params": _params(args), "raw": args.raw}
    if args.token_ids is not None:
        options["prompt"] = _numbers(args.token_ids)
    else:
        text = sys.stdin.buffer.read() if args.prompt == "-" else args.prompt
        if args.system is None:
            options["prompt"] = text
        else:
            options["messages"] = [
                {"role": "system", "content": args.system},
                {"role": "user", "content": text},
            ]
    with _load(args) as llm:
        if args.json:
            _print_json(llm.generate(**options).to_dict())
            return 0
        _show(llm.stream(**options))
    return 0


def _chat(args: argparse.Namespace) -> int:
    params = _params(args)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are not UTF-8 become an error of that turn, not of the program.
        sys.stdin.reconfigure(errors="surrogateescape")
    status = 0
    with _load(args) as llm:
        session = llm.session(args.system)
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
            _show(stream)
        finally:
            stream.close()
    except KeyboardInterrupt:
        print("\n(stopped; this turn is forgotten)", file=sys.stderr)
    except InvalidRequest as error:
        print(f"error [{error.code}]: {error}", file=sys.stderr)
        return 1
    return 0


def _bench(args: argparse.Namespace) -> int:
    from edgecascade.bench import bench

    result = bench(
        _synthetic(args) if args.synthetic else args.bundle,
        backend=args.backend,
        threads=args.threads,
        max_context=args.max_context,
        prompt_tokens=args.prompt_tokens,
        decode_tokens=args.decode_tokens,
        repeats=args.repeats,
    )
    if args.json:
        _print_json(result)
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
    _print_facts(facts)
    return 0


def _synthetic(args: argparse.Namespace) -> str:
    """A bundle of a real model's shapes, written once into the user's cache folder."""
    from build_engine.synthetic import config, write_synthetic
    from edgecascade.bundle import Bundle
    from edgecascade.errors import BundleError
    from edgecascade.verified import cache_folder

    layers = "all" if args.layers is None else f"{args.layers}"
    path = cache_folder() / "synthetic" / f"{args.synthetic}-{layers}-{args.precision}"
    try:
        Bundle.open(path).close()
    except BundleError:  # not there yet, or of an older format
        config(args.synthetic, args.layers)  # refuses what it does not know
        print(f"writing {path}", file=sys.stderr)
        write_synthetic(
            path, args.synthetic, args.layers, precision=args.precision, overwrite=path.exists()
        )
    return str(path)


def _doctor(args: argparse.Namespace) -> int:
    from edgecascade.doctor import examine

    found = examine()
    if args.json:
        _print_json(found)
        return 0
    library = found["library"]
    facts = {
        "edgecascade": f"{found['version']}, Python {found['python']}, {found['platform']}",
        "processor": f"{found['processor']}, {found['cores']} cores",
        "memory": f"{_gigabytes(found['memory_bytes'])}, "
        f"{_gigabytes(found['available_bytes'])} available",
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
    _print_facts(facts)
    return 1 if "problem" in library else 0


def _serve(args: argparse.Namespace) -> int:
    from edgecascade.service.config import from_options
    from edgecascade.service.service import Service

    config = from_options(args)
    with (
        _load(args, slots=args.slots, max_queue=args.max_queue) as llm,
        Service(llm, config) as service,
    ):

        def drain(number: int, frame: object) -> None:
            signal.signal(number, signal.default_int_handler)  # the second time it is meant
            service.stop()

        before = {
            number: signal.signal(number, drain) for number in (signal.SIGINT, signal.SIGTERM)
        }
        print(
            f"serving {service.model} as {config.device_id} at {config.address().shown}; "
            "Ctrl-C drains and ends",
            file=sys.stderr,
        )
        try:
            service.run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0


def _ask(args: argparse.Namespace) -> int:
    from edgecascade.client import Client
    from edgecascade.service.config import PASSWORD_VARIABLE
    from edgecascade.service.topics import DEFAULT_PREFIX

    text = sys.stdin.read() if args.text == "-" else args.text
    messages = [{"role": "system", "content": args.system}] if args.system else []
    messages.append({"role": "user", "content": text})
    with Client(
        args.mqtt,
        client_id=args.client_id,
        prefix=args.prefix or DEFAULT_PREFIX,
        username=args.username,
        password=os.environ.get(PASSWORD_VARIABLE),
        ca=args.ca,
        cert=args.cert,
        key=args.key,
    ) as client:
        options = {"timeout_s": args.timeout, **_wire_parameters(args)}
        if args.json:
            _print_json(dict(client.chat(args.device, messages, **options).body))
            return 0
        stream = client.stream(args.device, messages, **options)
        for piece in stream:
            if piece.restart:
                print("\n(the device began anew)", file=sys.stderr)
            print(piece.reasoning, end="", file=sys.stderr, flush=True)
            print(piece.text, end="", flush=True)
        print(flush=True)
        answer = stream.answer
        print(
            f"[{answer.device}; {_figures(answer.body)}; {answer.finish_reason}]", file=sys.stderr
        )
    return 0


def _wire_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options under their names on the wire; what was not given is not sent."""
    names = ("temperature", "top_p", "top_k", "min_p", "seed", "thinking_budget")
    given = {name: getattr(args, name) for name in names}
    given["max_completion_tokens"] = args.max_tokens
    given["stop"] = args.stop or None
    given["reasoning_effort"] = "none" if args.thinking is False else None
    return {name: value for name, value in given.items() if value is not None}


def _figures(body: Mapping[str, Any]) -> str:
    usage, times = body["usage"], body.get("timings", {})
    return (
        f"{usage['prompt_tokens']} tokens read, {usage['completion_tokens']} made, "
        f"{times.get('tok_s', 0.0):.1f}/s; first after {times.get('ttft_ms', 0.0):.0f} ms"
    )


def _broker_config(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from edgecascade.service.broker import BrokerSetup, access_list, mosquitto_config

    given = {"prefix": args.prefix, "folder": args.folder, "operators": args.operator}
    setup = replace(
        BrokerSetup(),
        port=args.port,
        certificates=not args.passwords,
        pools=dict(_pool(text) for text in args.pool),
        **{name: value for name, value in given.items() if value is not None},
    )
    print(access_list(setup) if args.acl else mosquitto_config(setup), end="")
    return 0


def _pool(text: str) -> tuple[str, list[str]]:
    name, equals, devices = text.partition("=")
    if not (name and equals and devices):
        raise InvalidRequest(f"--pool is {text!r}; give NAME=DEVICE,DEVICE")
    return name, devices.split(",")


def _unit(args: argparse.Namespace) -> int:
    from edgecascade.service.units import unit

    program = os.path.abspath(sys.argv[0])
    paths = (os.path.abspath(args.bundle), os.path.abspath(args.config))
    print(unit(*paths, program=program, user=args.user), end="")
    return 0


def _load(args: argparse.Namespace, **options: Any) -> LLM:
    from edgecascade.llm import LLM

    return LLM.load(
        args.bundle, args.backend, threads=args.threads, max_context=args.max_context, **options
    )


def _params(args: argparse.Namespace) -> SamplingParams:
    from edgecascade.sampling import SamplingParams

    return SamplingParams(
        **{name: getattr(args, name) for name in SamplingParams.names() if hasattr(args, name)}
    )


def _show(pieces: Iterable[Piece]) -> None:
    """Stream the answer to stdout, the reasoning and the figures to stderr."""
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    completion: Completion | None = None
    reasoning = False
    for piece in pieces:
        if piece.reasoning:
            reasoning = True
            print(f"{dim}{piece.reasoning}{plain}", end="", file=sys.stderr, flush=True)
        if reasoning and (piece.text or piece.tool_calls or piece.finish_reason):
            reasoning = False
            print(file=sys.stderr, flush=True)
        for call in piece.tool_calls:
            print(json.dumps({"name": call.name, "arguments": call.arguments}), flush=True)
        if piece.text:
            print(piece.text, end="", flush=True)
        completion = piece.completion
    print(flush=True)
    if completion is not None:
        usage, times = completion.usage, completion.timings
        print(
            f"{dim}[{usage.prompt_tokens} tokens read, {usage.cached_tokens} of them kept; first "
            f"token after {times.first_token_s:.2f} s; {usage.completion_tokens} tokens made, "
            f"{times.decode_tokens_per_s:.1f}/s; {completion.finish_reason}; "
            f"seed {completion.seed}]{plain}",
            file=sys.stderr,
        )


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _print_facts(facts: dict[str, str]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def _print_tables(tables: Iterable[Any]) -> None:
    from rich.console import Console

    # Wide enough for every column where the output is a file or a pipe.
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in tables:
        console.print(table)


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidRequest(f"--token-ids is {text!r}; write numbers as in 1,2,3") from error


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _at_least_two(text: str) -> int:
    return _at_least(text, 2)


def _at_least(text: str, low: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of {low} or more")
    return int(text)


class _Version(argparse.Action):
    """Prints the version; the package's metadata are only read when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from edgecascade.doctor import package_version

        print(f"edgecascade {package_version()}")
        parser.exit()
