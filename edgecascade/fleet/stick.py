# SPDX-License-Identifier: Apache-2.0
"""Installing from a published folder: what is asked of an agent that runs, and what it answers.

An answer is, for each order of the folder, why nothing more will come of it; nothing if a verdict
will; None as long as the order is not judged.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from edgecascade.files import canonical_json, replace_file
from edgecascade.fleet.state import DeviceState

REQUEST = "install.request"  # below the device's root
ANSWER = "install.answer"

Answers = Mapping[str, str | None]


def ask(root: Path, folder: Path) -> None:
    """Leave a request for the agent that owns a device's root."""
    (root / ANSWER).unlink(missing_ok=True)
    replace_file(root / REQUEST, os.fsencode(folder))


def take(root: Path) -> str | None:
    """The folder that is asked for, once; None for none."""
    try:
        folder = os.fsdecode((root / REQUEST).read_bytes())
        (root / REQUEST).unlink()
    except FileNotFoundError:
        return None
    return folder


def answer(root: Path, answers: Answers) -> None:
    """Say what has come of the orders so far; a disk that is full must not end an agent."""
    with contextlib.suppress(OSError):
        replace_file(root / ANSWER, canonical_json(answers))


def answered(root: Path) -> dict[str, str | None]:
    """What was said so far."""
    try:
        said: dict[str, str | None] = json.loads((root / ANSWER).read_bytes())
    except FileNotFoundError:
        return {}
    return said


def no_order(folder: str, groups: Iterable[str]) -> str:
    """What is said of a folder without an order for a device."""
    return f"{folder} has no order for the groups {', '.join(groups)} in orders/"


def is_over(answers: Answers, state: DeviceState) -> bool:
    """Whether nothing more will come of any order."""

    def ended(order: str, why: str | None) -> bool:
        current = state.update
        if current is not None and current.order.order == order and not current.paused:
            return False
        return bool(why) or (why is not None and state.verdict(order) is not None)

    return bool(answers) and all(ended(*each) for each in answers.items())
