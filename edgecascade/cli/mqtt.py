# SPDX-License-Identifier: Apache-2.0
"""serve · ask · broker-config · unit"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from edgecascade.cli.options import (
    add_backend,
    add_conversation,
    add_sampling,
    load,
    positive,
    read_tools,
)
from edgecascade.cli.show import Talk, print_json
from edgecascade.cli.signals import stopped_by
from edgecascade.errors import InvalidRequest
from edgecascade.text.tokenizer import checked_text


def add(commands: Any) -> None:
    """The commands and their options."""
    from edgecascade.service.config import add_options

    serve = commands.add_parser("serve", help="answer requests over MQTT")
    serve.add_argument("bundle")
    serve.add_argument("--slots", type=positive, default=8, help="requests that run side by side")
    serve.add_argument("--max-queue", type=positive, default=64, help="requests that may wait")
    add_options(serve)
    add_backend(serve)
    serve.set_defaults(run=_serve)

    ask = commands.add_parser("ask", help="ask a device over MQTT")
    ask.add_argument("text", help="what to ask; - reads it from stdin")
    ask.add_argument("--mqtt", required=True, metavar="URL", help="the broker")
    ask.add_argument("--device", help="by default any that accepts requests")
    add_conversation(ask)
    ask.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS")
    ask.add_argument("--json", action="store_true", help="the whole answer as JSON")
    for name in ("client-id", "prefix", "username", "ca", "cert", "key"):
        ask.add_argument(f"--{name}")
    add_sampling(ask)
    ask.set_defaults(run=_ask)

    broker = commands.add_parser("broker-config", help="print a Mosquitto configuration")
    broker.add_argument("--acl", action="store_true", help="print the access list instead")
    broker.add_argument("--prefix", help="first levels of all topics")
    broker.add_argument("--port", type=positive, default=8883)
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


def _serve(args: argparse.Namespace) -> int:
    from edgecascade.service.config import from_options
    from edgecascade.service.service import Service

    config = from_options(args)
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else it was started by nohup
        numbers.append(signal.SIGHUP)
    with (
        load(args, slots=args.slots, max_queue=args.max_queue) as llm,
        Service(llm, config) as service,
        stopped_by(numbers, service.stop),
    ):
        print(
            f"serving {service.model} as {config.device_id} at {config.address().shown}; "
            "Ctrl-C drains and ends",
            file=sys.stderr,
        )
        service.run()
    return 0


def _ask(args: argparse.Namespace) -> int:
    from edgecascade.client import Client
    from edgecascade.service.config import PASSWORD_VARIABLE
    from edgecascade.service.topics import DEFAULT_PREFIX

    given = sys.stdin.buffer.read() if args.text == "-" else args.text
    text = checked_text(given, "the text")
    if not text:
        raise InvalidRequest("the text is empty; give at least one character")
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages.append({"role": "user", "content": text})
    with Client(
        args.mqtt,
        client_id=args.client_id,
        prefix=DEFAULT_PREFIX if args.prefix is None else args.prefix,
        username=args.username,
        password=os.environ.get(PASSWORD_VARIABLE),
        ca=args.ca,
        cert=args.cert,
        key=args.key,
    ) as client:
        options = {"timeout_s": args.timeout, **_wire_parameters(args)}
        if (tools := read_tools(args)) is not None:
            options["tools"] = tools
        if args.json:
            print_json(dict(client.chat(args.device, messages, **options).body))
            return 0
        stream = client.stream(args.device, messages, **options)
        talk = Talk()
        for piece in stream:
            if piece.restart:
                talk.begin_anew("the device began anew")
            talk.add(piece.reasoning, piece.text)
        answer = stream.answer
        talk.add(calls=answer.tool_calls)
        talk.end()
        talk.figures(f"{answer.device}; {_figures(answer.body)}; {answer.finish_reason}")
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
    usage, times = body.get("usage") or {}, body.get("timings") or {}
    return (
        f"{usage.get('prompt_tokens', 0)} tokens read, {usage.get('completion_tokens', 0)} made, "
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
