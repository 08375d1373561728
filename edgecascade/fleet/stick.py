# SPDX-License-Identifier: Apache-2.0
"""Installing from a published folder: what is asked of an agent that runs, and what it answers."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from edgecascade.files import canonical_json, replace_file
from edgecascade.fleet.orders import Order
from edgecascade.fleet.state import DeviceState

REQUEST = "install.request"  # below the device's root
ANSWER = "install.answer"


@dataclass(frozen=True)
class Outcome:
    """What an order of the folder has come to: a verdict, when it is over and there is no `why`.

    Before that, `why` is what it waits for, if that is known.
    """

    over: bool = False
    why: str = ""


Outcomes = Mapping[str, Outcome]


def ask(root: Path, folder: Path) -> None:
    """Leave a request for the agent that owns a device's root."""
    (root / ANSWER).unlink(missing_ok=True)
    replace_file(root / REQUEST, os.fsencode(folder))


def take(root: Path) -> str | None:
    """The folder that is asked for, once; None for none.

    Raises:
        OSError: for a request that cannot be read; it is gone, if it can be removed.
    """
    try:
        return os.fsdecode((root / REQUEST).read_bytes())
    except FileNotFoundError:
        return None
    finally:
        (root / REQUEST).unlink(missing_ok=True)


def answer(root: Path, outcomes: Outcomes) -> None:
    """Say what has come of the orders so far; a disk that is full must not end an agent."""
    said = {order: asdict(outcome) for order, outcome in outcomes.items()}
    with contextlib.suppress(OSError):
        replace_file(root / ANSWER, canonical_json(said))


def answered(root: Path) -> dict[str, Outcome]:
    """What was said so far."""
    try:
        said = json.loads((root / ANSWER).read_bytes())
    except FileNotFoundError:
        return {}
    return {order: Outcome(**outcome) for order, outcome in said.items()}


def no_order(folder: str, groups: Iterable[str]) -> str:
    """What is said of a folder without an order for a device."""
    return f"{folder} has no order for the groups {', '.join(groups)} in orders/"


def outcome(order: Order, state: DeviceState, *, pending: bool, trouble: str = "") -> Outcome:
    """What an order that was offered has come to; `pending` and `trouble` as the executor says."""
    name, current = order.order, state.update
    if order.action != "install":
        return Outcome(True, f"order {name!r} says {order.action}, and installs nothing")
    if pending:
        return Outcome(False, f"order {name!r} waits for the disk: {trouble}" if trouble else "")
    if current is not None and current.order.order == name:
        return Outcome(True, f"order {name!r} is paused until the operator resumes it")
    if state.verdict(name) is not None:
        return Outcome(True)
    heard = state.seqs.get(order.key, -1)
    if heard >= order.seq:
        before = f"order {name!r} has the number {order.seq}, {heard} was heard before it"
        return Outcome(True, before)
    text = f"order {name!r} is not taken: another came in its place; give it again"
    return Outcome(True, text)


def is_over(outcomes: Outcomes) -> bool:
    """Whether nothing more will come of any order."""
    return bool(outcomes) and all(each.over for each in outcomes.values())
