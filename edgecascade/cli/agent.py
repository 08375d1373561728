# SPDX-License-Identifier: Apache-2.0
"""agent: the program that updates a device and keeps its service running"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecascade.cli.show import plain, print_json
from edgecascade.cli.signals import stopped_by
from edgecascade.errors import InvalidRequest

if TYPE_CHECKING:
    from edgecascade.fleet.settings import AgentSettings
    from edgecascade.fleet.state import DeviceState
    from edgecascade.fleet.stick import Outcomes

POLL_S = 0.5


def add(commands: Any) -> None:
    """The command and its options."""
    from edgecascade.fleet.settings import add_options

    agent = commands.add_parser(
        "agent",
        help="update a device, and keep its service running",
        description="run: work until Ctrl-C or SIGTERM. enroll [FOLDER]: what the operator needs "
        "to believe this device's reports, printed, or written as DEVICE.enroll.json. install "
        "FOLDER: take the orders of a published folder, such as a memory stick. status: how the "
        "device stands. unit: print a systemd unit.",
    )
    agent.add_argument(
        "action", nargs="?", default="run", choices=("run", "enroll", "install", "status", "unit")
    )
    agent.add_argument(
        "folder", nargs="?", help="of install: the published folder; of enroll: such as a stick"
    )
    add_options(agent)
    agent.add_argument("--json", action="store_true", help="of status and install: as JSON")
    agent.add_argument("--user", default="edgecascade", help="of unit")
    agent.add_argument(
        "--timeout", type=float, default=7200.0, metavar="SECONDS", help="of install"
    )
    agent.set_defaults(run=_agent)


def _agent(args: argparse.Namespace) -> int:
    if args.action == "install" and args.folder is None:
        raise InvalidRequest("agent install takes a folder: the one that was published")
    if args.folder is not None and args.action not in ("install", "enroll"):
        raise InvalidRequest(f"agent {args.action} takes no folder; install and enroll do")
    if args.action == "unit":
        return _unit(args)
    if args.action == "status":
        return _status(args)
    from edgecascade.fleet.settings import from_options

    settings = from_options(args)
    if args.action == "enroll":
        return _enroll(settings, args.folder)
    return _install(args, settings) if args.action == "install" else _run(settings)


def _enroll(settings: AgentSettings, folder: str | None) -> int:
    from edgecascade.fleet.agent import own
    from edgecascade.fleet.identity import enrolment, own_key, put_enrolment, stored_key

    try:
        with own(settings.folder):
            key = own_key(settings.folder)
    except InvalidRequest:
        known = stored_key(settings.folder)  # an agent runs, and has made it
        if known is None:
            raise
        key = known
    if folder is None:
        print(enrolment(settings, key).decode())
        return 0
    path = put_enrolment(folder, settings, key)
    print(f"{path}: give it to the operator, for edgecascade fleet devices --enroll")
    return 0


def _run(settings: AgentSettings) -> int:
    from edgecascade.fleet.agent import Agent

    agent = Agent(settings)
    with stopped_by((signal.SIGINT, signal.SIGTERM), agent.stop):
        where = settings.mqtt and settings.address().shown
        print(
            f"agent {settings.name} of {settings.device_id} at {where or 'no broker'}, "
            f"groups {', '.join(settings.groups)}; Ctrl-C ends it",
            file=sys.stderr,
        )
        agent.run()
    return 0


def _install(args: argparse.Namespace, settings: AgentSettings) -> int:
    from dataclasses import replace

    from edgecascade.fleet import stick
    from edgecascade.fleet.agent import Agent, own

    folder = Path(args.folder).resolve()
    if not any((folder / "orders" / f"{group}.json").exists() for group in settings.groups):
        raise InvalidRequest(stick.no_order(str(folder), settings.groups))
    end, told = time.monotonic() + args.timeout, set[str]()
    try:
        own(settings.folder).close()
    except InvalidRequest:  # an agent runs: it shall do it
        stick.ask(settings.folder, folder)
        outcomes: Outcomes = {}
        while time.monotonic() < end and not _is_over(outcomes, told):
            time.sleep(POLL_S)
            outcomes = stick.answered(settings.folder)
        # The state is read later than the outcomes: it holds the verdicts that they tell of.
        return _show(outcomes, _state(settings.folder), as_json=args.json)
    agent = Agent(replace(settings, mqtt="", service=None, repository=()))
    agent.install(str(folder))
    agent.run(lambda: _is_over(agent.outcomes, told) or time.monotonic() > end)
    return _show(agent.outcomes, agent.state, as_json=args.json)


def _is_over(outcomes: Outcomes, told: set[str]) -> bool:
    """Whether nothing more will come; what an order waits for is told once."""
    from edgecascade.fleet import stick

    waits = [each.why for each in outcomes.values() if each.why and not each.over]
    for why in dict.fromkeys(waits):
        if why not in told:
            print(plain(why), file=sys.stderr)
            told.add(why)
    return stick.is_over(outcomes)


def _show(outcomes: Outcomes, state: DeviceState, *, as_json: bool) -> int:
    from dataclasses import asdict

    from edgecascade.fleet import stick

    ended = [name for name, each in outcomes.items() if each.over and not each.why]
    found = [verdict for name in ended if (verdict := state.verdict(name)) is not None]
    refused = {name: each.why or f"order {name!r}: no verdict in time"
               for name, each in outcomes.items() if name not in ended}  # fmt: skip
    if as_json:
        print_json({"verdicts": [asdict(v) for v in found], "refused": refused})
    else:
        for verdict in found:
            said = " ".join(f"{key}: {value}" for key, value in verdict.evidence.items())
            print(f"{verdict.order}: {verdict.state} {verdict.bundle_to}  {plain(said)}".rstrip())
        for why in refused.values() if outcomes else ("the agent does not answer",):
            print(plain(why), file=sys.stderr)
    good = {verdict.state for verdict in found} == {"SUCCEEDED"} and len(found) == len(ended)
    return 0 if good and stick.is_over(outcomes) else 1


def _state(root: Path) -> Any:
    from edgecascade.fleet.executor import STATE
    from edgecascade.fleet.state import DeviceState, read_state

    try:
        return read_state((root / STATE).read_bytes())
    except FileNotFoundError:
        return DeviceState()


def _status(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from edgecascade.fleet.agent import own
    from edgecascade.fleet.orders import order_to_json
    from edgecascade.fleet.settings import AgentSettings
    from edgecascade.service.config import read_file

    root = args.root or (read_file(args.config, AgentSettings).get("root") if args.config else None)
    if root is None:
        raise InvalidRequest("give the device's folder: --root DIR, or --config with its root")
    if not Path(root).is_dir():
        raise InvalidRequest(f"root is {root!r}, which is no folder; give the device's: --root DIR")
    state = _state(Path(root))
    try:
        own(Path(root)).close()
        running = False
    except InvalidRequest:
        running = True
    update = state.update
    facts = {
        "agent_runs": running,
        "active": state.active and asdict(state.active),
        "previous": state.previous and asdict(state.previous),
        "golden": state.golden and asdict(state.golden),
        "update": update and {**asdict(update), "order": order_to_json(update.order)},
        "verdicts": [asdict(verdict) for verdict in state.verdicts],
    }
    if args.json:
        print_json(facts)
        return 0
    for name in ("active", "previous", "golden"):
        slot = getattr(state, name)
        print(f"{name:9} {f'{slot.name} {slot.version}  {slot.manifest}' if slot else '-'}")
    word = f"{update.order.order}: {update.phase.value}" if update else "-"
    print(f"{'update':9} {word}\n{'agent':9} {'runs' if running else 'does not run'}")
    for verdict in state.verdicts:
        reason = verdict.evidence.get("reason", "")
        print(f"{verdict.order}: {verdict.state} {verdict.bundle_to} {plain(str(reason))}".rstrip())
    return 0


def _unit(args: argparse.Namespace) -> int:
    from edgecascade.service.units import agent_unit

    if args.config is None:
        raise InvalidRequest("agent unit needs --config FILE")
    program = os.path.abspath(sys.argv[0])
    print(agent_unit(os.path.abspath(args.config), program=program, user=args.user), end="")
    return 0
