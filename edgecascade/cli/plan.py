# SPDX-License-Identifier: Apache-2.0
"""What a rollout is asked to be: options of `fleet rollout`, and the record that they make."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgecascade.cli.options import natural, positive, within
from edgecascade.errors import InvalidRequest

if TYPE_CHECKING:
    from edgecascade.fleet.orders import Window
    from edgecascade.fleet.record import Record
    from edgecascade.fleet.release import Release

DAY_S = 86_400.0
# Not the parser's: a rollout that goes on has to know what was given.
DEFAULTS = {
    "stages": "first,1,5,25,100",
    "mirror": (),
    "parallel": 4,
    "soak": 300.0,
    "pass_percent": 95.0,
    "fail_percent": 5.0,
    "tolerate_lost": 0,
    "retries": 3,
    "allow_downgrade": False,
    "valid_days": 7.0,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is rolled out, to whom and how."""
    parser.add_argument("name", help="of the model, as published")
    parser.add_argument("version", nargs="?", help="the newest by default")
    parser.add_argument("--group", required=True, help="of devices")
    parser.add_argument("--order", help="a name for this rollout")
    parser.add_argument("--stages", help=f"one device, then percent ({DEFAULTS['stages']})")
    parser.add_argument("--first", metavar="DEVICE", help="the first device")
    parser.add_argument("--mirror", action="append", metavar="URL",
                        help="where devices fetch, the nearest first; several times")  # fmt: skip
    parser.add_argument(
        "--egress", help="of all mirrors together, as 10Gbit: sets each device's share"
    )
    parser.add_argument("--limit", metavar="RATE", help="of each device, as 20Mbit")
    parser.add_argument("--parallel", type=positive, help="downloads of a device")
    parser.add_argument("--window", help="as 01:30+180@Europe/Berlin: when devices may work")
    parser.add_argument("--soak", type=within(0, 30 * DAY_S), metavar="SECONDS",
                        help="between a stage's success and the next stage")  # fmt: skip
    parser.add_argument("--lost-after", type=within(1, DAY_S), metavar="SECONDS",
                        help="silence on trial (default: from the release's health)")  # fmt: skip
    parser.add_argument("--pass-percent", type=within(50, 100))
    parser.add_argument("--fail-percent", type=within(0, 100))
    parser.add_argument("--tolerate-lost", type=natural, metavar="DEVICES")
    parser.add_argument("--retries", type=natural, help="of a download")
    parser.add_argument("--allow-downgrade", action="store_true", default=None)
    parser.add_argument("--valid-days", type=float, help="of each signature")


def new_record(args: argparse.Namespace, release: Release, sha256: str) -> Record:
    """The rollout that the options ask for; it has no number yet.

    Raises:
        InvalidRequest: for what cannot be.
    """
    from edgecascade.fleet.home import order_id, rate, stages, window
    from edgecascade.fleet.orders import Cohort, Limits, Order, Policy
    from edgecascade.fleet.record import Record
    from edgecascade.fleet.rollout import Plan, Progress, Thresholds

    given = {name: value for name, value in vars(args).items() if value is not None}
    args, now = argparse.Namespace(**{**vars(args), **DEFAULTS, **given}), time.time()
    name = args.order or order_id(release.name, release.version, now)
    health = release.health
    lost_s = args.lost_after
    if lost_s is None:
        lost_s = 2 * (health.load_s + health.soak_s) + 300.0
    plan = Plan(
        name,
        stages=stages(args.stages),
        thresholds=Thresholds(
            success=args.pass_percent / 100,
            failed=args.fail_percent / 100,
            lost=args.tolerate_lost + 1,
            lost_s=lost_s,
            soak_s=args.soak,
        ),
        first=args.first,
        bytes=sum(release.blobs.values()),
        egress_kbit_s=rate(args.egress) if args.egress else None,
        valid_s=args.valid_days * DAY_S,
    )
    try:
        order = Order(
            order=name,
            seq=1,
            group=args.group,
            bundle=release.name,
            version=release.version,
            release_sha256=sha256,
            not_before=0.0,
            expires=now + plan.valid_s,
            window=window(args.window) if args.window else None,
            cohort=Cohort(name, 100),
            limits=Limits(int(rate(args.limit)) if args.limit else None, args.parallel),
            policy=Policy(args.retries, args.allow_downgrade),
            mirrors=tuple(args.mirror),
        )
    except ValueError as error:
        raise InvalidRequest(f"no such order can be: {error}") from None
    return Record(order, plan, Progress(1))


def check_same(args: argparse.Namespace, known: Record, wanted: Record, broker: str) -> None:
    """A rollout that goes on does so as it began: its plan does not change.

    Raises:
        InvalidRequest: when an option is given that asks for something else.
    """
    other = [
        f"--{name.replace('_', '-')} {shown(has)}, not {shown(wants)}"
        for name, (value, shown) in SHOWN.items()
        if getattr(args, name) is not None and (has := value(known)) != (wants := value(wanted))
    ]
    if other:
        order = known.order.order
        raise InvalidRequest(
            f"{order} goes on with {'; '.join(other)}; leave that out, or end the rollout first: "
            f"edgecascade fleet abort {order} --mqtt {broker}"
        )


def _number(value: float) -> str:
    return f"{value:.12g}"


def _rate(kbit_s: float | None) -> str:
    return "without end" if kbit_s is None else f"{_number(kbit_s)}kbit"


def _window(found: Window | None) -> str:
    from edgecascade.fleet.home import DAYS

    if found is None:
        return "always"
    days = ",".join(DAYS[day] for day in found.days)
    return f"{days}:" * bool(days) + f"{found.start}+{found.minutes}@{found.tz}"


# What a record has, and how the option writes that.
SHOWN: dict[str, tuple[Callable[[Record], Any], Callable[[Any], str]]] = {
    "order": (lambda record: record.order.order, str),
    "stages": (
        lambda record: record.plan.stages,
        lambda parts: ",".join(_number(part) if part else "first" for part in parts),
    ),
    "first": (lambda record: record.plan.first, lambda first: first or "the one that comes first"),
    "mirror": (lambda record: record.order.mirrors, lambda mirrors: " ".join(mirrors) or "none"),
    "egress": (lambda record: record.plan.egress_kbit_s, _rate),
    "limit": (lambda record: record.order.limits.kbit_s, _rate),
    "parallel": (lambda record: record.order.limits.parallel, str),
    "window": (lambda record: record.order.window, _window),
    "soak": (lambda record: record.plan.thresholds.soak_s, _number),
    "lost_after": (lambda record: record.plan.thresholds.lost_s, _number),
    "pass_percent": (lambda record: 100 * record.plan.thresholds.success, _number),
    "fail_percent": (lambda record: 100 * record.plan.thresholds.failed, _number),
    "tolerate_lost": (lambda record: record.plan.thresholds.lost - 1, str),
    "retries": (lambda record: record.order.policy.retries, str),
    "allow_downgrade": (
        lambda record: record.order.policy.allow_downgrade,
        lambda allowed: str(allowed).lower(),
    ),
    "valid_days": (lambda record: record.plan.valid_s / DAY_S, _number),
}
