# SPDX-License-Identifier: Apache-2.0
"""An operator's folder, and what its parts do together.

repository/     what devices fetch: behind any static HTTP server, in an object store, on a stick
keys/           private keys, for their owner only; some belong on sticks in a drawer
root.json       what a device is given when it is set up, to tell this repository from others
devices.json    which devices there are, and the keys that their reports are signed with
rollouts/       what was asked for and where it stands
audit.jsonl     what was done, chained
"""

from __future__ import annotations

import getpass
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from edgecascade.errors import InvalidRequest, UpdateRefused
from edgecascade.files import replace_file
from edgecascade.fleet import audit, orders
from edgecascade.fleet.keys import KeyFolders
from edgecascade.fleet.operator import Signing
from edgecascade.fleet.orders import Order, Window
from edgecascade.fleet.record import Records
from edgecascade.fleet.register import Register
from edgecascade.fleet.rollout import FIRST

if TYPE_CHECKING:
    from edgecascade.fleet.repository import Repository

ROOT = "root.json"
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")  # of a window; their index is the order's
UNITS = {"": 1e-3, "k": 1.0, "M": 1e3, "G": 1e6}  # of bit/s, in kbit/s


class Home:
    """The folder, and the key folders if others are used."""

    def __init__(
        self, folder: str | Path, keys: Sequence[str | Path] = (), password: str | None = None
    ) -> None:
        self.folder = Path(folder)
        self.keys = KeyFolders(keys or [self.folder / "keys"], password)
        self.records = Records(self.folder / "rollouts")
        self.register = Register(self.folder / "devices.json")
        self.log = self.folder / "audit.jsonl"

    @property
    def served(self) -> Path:
        """The repository's folder."""
        return self.folder / "repository"

    def repository(self) -> Repository:
        """The repository.

        Raises:
            FleetError: when there is none, or the extra is not installed.
        """
        from edgecascade.fleet.repository import Repository

        found = Repository(self.served, self.keys)
        if not (self.folder / ROOT).exists():  # an init that was killed has not come to it
            self.put_root(found)
        return found

    def init(self, profile: str, operators: Sequence[str]) -> Repository:
        """Make the folder, keys and an empty repository."""
        from edgecascade.fleet.repository import Repository

        self.folder.mkdir(parents=True, exist_ok=True)
        made = Repository.init(
            self.served, self.keys, time.time(), profile=profile, operators=operators
        )
        self.put_root(made)
        self.note("init", {"profile": profile, "operators": list(operators)})
        return made

    def put_root(self, repository: Repository) -> None:
        """Bring root.json up to date, for devices that are set up from now on."""
        replace_file(self.folder / ROOT, repository.root_json)

    def note(self, event: str, facts: Mapping[str, Any]) -> None:
        """A line in the audit log."""
        audit.append(self.log, event, time.time(), {**facts, "user": getpass.getuser()})

    def check_enrolled(self, group: str, first: str | None = None) -> None:
        """A rollout needs devices that are known; `first` is to be one of them.

        Raises:
            InvalidRequest: when there are none.
        """
        known = {key.device for key in self.register.read().of(group)}
        if not known:
            raise InvalidRequest(
                f"no device of group {group!r} is enrolled in {self.register.path}; on each device "
                "say edgecascade agent enroll > FILE, and here edgecascade fleet devices --enroll "
                "FILE"
            )
        if first is not None and first not in known:
            raise InvalidRequest(
                f"device {first!r} is not enrolled in group {group!r}; edgecascade fleet devices "
                "shows who is"
            )

    def signing(self) -> Signing:
        """Orders signed with the keys at hand, and kept in the repository for who has no broker."""
        repository = self.repository()

        def verified(envelope: bytes) -> Order | None:
            try:
                return orders.verify(envelope, repository.order_keys(), time.time())
            except UpdateRefused:
                return None

        return Signing(repository.sign_order, verified, lambda: repository.order_keys().first_seq)


def order_id(name: str, version: str, now: float) -> str:
    """A name for a rollout that nobody has to invent."""
    at = datetime.fromtimestamp(now, timezone.utc).strftime("%Y%m%d-%H%M%S")
    plain = re.sub(r"[^A-Za-z0-9_-]", "-", f"{name}-{version}")
    return f"{plain[:48]}-{at}"


def rate(text: str) -> float:
    """A rate such as 10Gbit, 200Mbit or 500kbit, in kbit/s.

    Raises:
        InvalidRequest: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMG]?)bit(?:/s)?", text)
    if match is None or not float(match[1]):
        raise InvalidRequest(f"{text!r} is no rate; write 10Gbit, 200Mbit or 500kbit")
    return float(match[1]) * UNITS[match[2]]


def stages(text: str) -> tuple[float, ...]:
    """Stages such as first,1,5,25,100.

    Raises:
        InvalidRequest: for anything else.
    """
    try:
        parts = text.split(",")
        return tuple(FIRST if part == "first" else float(part.rstrip("%")) for part in parts)
    except ValueError:
        raise InvalidRequest(f"stages are {text!r}; write first,1,5,25,100") from None


def window(text: str) -> Window:
    """A window such as 01:30+180@Europe/Berlin, with days as in mon,sat:01:30+180@UTC.

    Raises:
        InvalidRequest: for anything else.
    """
    match = re.fullmatch(r"(?:([a-z,]+):)?(\d\d:\d\d)\+(\d{1,4})@(\S+)", text)
    if match is None or any(day not in DAYS for day in (match[1] or "mon").split(",")):
        raise InvalidRequest(
            f"window is {text!r}; write 01:30+180@Europe/Berlin or sat,sun:01:30+180@UTC"
        )
    chosen = tuple(sorted(DAYS.index(day) for day in match[1].split(","))) if match[1] else ()
    try:
        ZoneInfo(match[4])
        return Window(match[4], match[2], int(match[3]), chosen)
    except ZoneInfoNotFoundError as error:
        raise InvalidRequest(f"window {text!r}: {error}; write a zone as Europe/Berlin") from None
    except (ValueError, OSError) as error:
        raise InvalidRequest(f"window {text!r}: {error}") from None
