# SPDX-License-Identifier: Apache-2.0
"""fleet rollout · status · pause · resume · abort · rollback"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from edgecascade.cli import plan
from edgecascade.cli.screen import Screen, device, facts
from edgecascade.cli.show import print_json
from edgecascade.errors import InvalidRequest

if TYPE_CHECKING:
    from edgecascade.fleet.home import Home
    from edgecascade.fleet.operator import Controller, Operator
    from edgecascade.fleet.record import Record
    from edgecascade.fleet.rollout import Progress
    from edgecascade.service.config import BrokerAddress

STOPPED = 3  # exit status of a rollout that ended before everybody had the bundle
BACK_S = 3600.0  # a rollback is watched for at most so long

HomeOf = Callable[[argparse.Namespace], "Home"]


def add(acts: Any, home_options: Callable[[argparse.ArgumentParser], None], home: HomeOf) -> None:
    """The commands and their options."""
    rollout = acts.add_parser("rollout", help="bring a release to a group, stage by stage")
    home_options(rollout)
    broker_options(rollout)
    plan.add_options(rollout)
    rollout.set_defaults(run=lambda args: _rollout(args, home(args)))
    texts = {
        "status": "how a rollout stands",
        "pause": "hold what has not been activated",
        "resume": "go on with a paused rollout; failures so far are accepted",
        "abort": "nobody activates the release any more; who has it keeps it",
        "rollback": "who has the release goes back to what it had",
    }
    for name, text in texts.items():
        parser = acts.add_parser(name, help=text)
        home_options(parser)
        broker_options(parser)
        parser.add_argument("order", nargs="?", help="of the rollout (default: the newest)")
        act = _status if name == "status" else _change
        parser.set_defaults(run=lambda args, act=act: act(args, home(args)))


def broker_options(parser: argparse.ArgumentParser) -> None:
    """Where the broker is, who we are, and how to show things."""
    parser.add_argument("--mqtt", required=True, metavar="URL", help="the broker")
    parser.add_argument("--client-id", default="operator", help="named in the access list")
    for name in ("prefix", "username", "ca", "cert", "key"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def operator_address(args: argparse.Namespace) -> BrokerAddress:
    """Where `broker_options` say the broker is; the password comes from the environment."""
    from edgecascade.service.config import PASSWORD_VARIABLE, broker_address

    return broker_address(
        args.mqtt,
        username=args.username,
        password=os.environ.get(PASSWORD_VARIABLE),
        ca_file=args.ca,
        cert_file=args.cert,
        key_file=args.key,
    )


def _rollout(args: argparse.Namespace, home: Home) -> int:
    release, sha256 = home.repository().release(args.name, args.version)
    running, broker = _unfinished(home, args.group), operator_address(args).shown
    if running is None:
        record = plan.new_record(args, release, sha256)
    elif running.order.release_sha256 == sha256:
        record = running
        plan.check_same(args, record, plan.new_record(args, release, sha256), broker)
        print(f"going on with {record.order.order}", file=sys.stderr)
    else:
        raise InvalidRequest(
            f"{running.order.order} is {running.progress.state} in group {args.group!r}; "
            f"end it first: edgecascade fleet abort {running.order.order} --mqtt {broker}"
        )
    home.check_enrolled(args.group, record.plan.first)
    if record.progress.state == "paused":
        raise InvalidRequest(
            f"{record.order.order} is paused ({record.progress.reason}); go on with fleet resume"
        )
    with _control(args, home, record) as (controller, operator):
        if running is None:
            _file(home, operator, record)
        return _watch(args, controller, operator)


def _unfinished(home: Home, group: str) -> Record | None:
    mine = [record for record in home.records.all() if record.order.group == group]
    latest = mine[-1] if mine else None
    return latest if latest and latest.progress.state in ("running", "paused") else None


def _file(home: Home, operator: Operator, record: Record) -> None:
    """Give the rollout a number above all that were there, and write it down."""
    order, signing = record.order, home.signing()
    heard = signing.verified(operator.retained) if operator.retained else None
    with home.records.locked():
        if any(known.order.order == order.order for known in home.records.all()):
            raise InvalidRequest(f"there is a rollout {order.order!r} already; choose another name")
        seq = max(
            home.records.next_seq(order.group, signing.first_seq(), time.time()),
            home.repository().next_seq(order.group),
            heard.seq + 1 if heard else 1,
        )
        order, progress = replace(order, seq=seq), replace(record.progress, seq=seq)
        home.records.write(replace(record, order=order, progress=progress))
    home.note("rollout", {"order": order.order, "plan": asdict(record.plan)})


@contextmanager
def _control(
    args: argparse.Namespace, home: Home, record: Record
) -> Iterator[tuple[Controller, Operator]]:
    """A settled connection, and the controller of one rollout."""
    from edgecascade.fleet.operator import Controller, Operator
    from edgecascade.fleet.view import View
    from edgecascade.service.topics import DEFAULT_PREFIX, Topics

    order = record.order
    address = operator_address(args)
    view = View(order, home.register.read(), record.believed)
    topics = Topics(args.prefix or DEFAULT_PREFIX)
    with Operator(
        address, args.client_id, topics, view, group=order.group, order=order.order
    ) as operator:
        operator.settle()
        controller = Controller(
            operator, home.records, order.order, home.signing(), home.log, home.register.read
        )
        yield controller, operator


def _watch(args: argparse.Namespace, controller: Controller, operator: Operator) -> int:
    """Run the controller and show what it does."""
    with Screen(operator, as_json=args.json) as screen:
        try:
            turn = controller.run(screen.show)
        except KeyboardInterrupt:
            print("\nit stays at its stage; give the command again to go on", file=sys.stderr)
            raise
    return 0 if turn.record.progress.state == "done" else STOPPED


def _chosen(args: argparse.Namespace, home: Home) -> Record:
    return home.records.read(args.order) if args.order else home.records.latest()


def _status(args: argparse.Namespace, home: Home) -> int:
    from edgecascade.fleet import rollout
    from edgecascade.fleet.operator import Turn, order_trouble

    record = _chosen(args, home)
    with _control(args, home, record) as (_, operator):
        fleet, now = operator.look(), time.time()
        count = rollout.tally(record.plan, record.progress, fleet, now)
        doubts = operator.doubts()
        trouble = order_trouble(record, operator.retained, home.signing())
        turn = Turn(record, count, True, sum(doubts.values()))
        if args.json:
            devices = {name: device(seen, now) for name, seen in sorted(fleet.items())}
            said = [
                {"from": name, "reason": reason, "count": count}
                for (name, reason), count in sorted(doubts.items())
            ]
            print_json(
                {**facts(turn), "order_trouble": trouble, "not_believed": said, "devices": devices}
            )
        else:
            with Screen(operator, as_json=False, whole=True) as screen:
                screen.show(turn)
            if trouble:
                print(f"  {trouble}")
    return 0


def _change(args: argparse.Namespace, home: Home) -> int:
    """pause, resume, abort or rollback, and what there is to watch afterwards."""
    from edgecascade.fleet import rollout

    changes: dict[str, Callable[[Record, rollout.Fleet, float], Progress]] = {
        "pause": lambda record, _, now: rollout.pause(record.progress, now),
        "resume": lambda record, fleet, now: rollout.resume(
            record.plan, record.progress, fleet, now
        ),
        "abort": lambda record, _, now: rollout.abort(record.progress, now),
        "rollback": lambda record, _, now: rollout.rollback(record.progress, now),
    }
    watch = {"resume": _watch, "rollback": _watch_back}
    record = _chosen(args, home)
    with _control(args, home, record) as (controller, operator):
        turn = controller.act(changes[args.act])
        if args.act in watch:
            return watch[args.act](args, controller, operator)
        with Screen(operator, as_json=args.json) as screen:
            screen.show(turn)
    return 0


def _watch_back(args: argparse.Namespace, controller: Controller, operator: Operator) -> int:
    """Until every device that is there has gone back; the others do when they come."""
    from edgecascade.fleet import rollout

    end = time.monotonic() + BACK_S
    with Screen(operator, as_json=args.json) as screen:
        while True:
            turn = controller.turn()
            screen.show(turn)
            left, silent = rollout.going_back(operator.look())
            if turn.settled and not left:
                if silent:
                    print(f"{silent} silent devices go back when they come", file=sys.stderr)
                return 0
            if time.monotonic() > end:
                print(f"{left + silent} devices have not gone back yet", file=sys.stderr)
                return STOPPED
            operator.wait(1.0)
            time.sleep(0.2)
