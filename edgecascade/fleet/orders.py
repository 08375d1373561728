# SPDX-License-Identifier: Apache-2.0
"""What an operator signs: which release a group of devices installs, when, and how many of them.

An order is a DSSE envelope with ed25519 signatures. All stages of a rollout, its pauses and its
abort are the same order signed again with the next sequence number, so a device needs only the
latest one. Nothing here does I/O.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from edgecascade.errors import FleetError, UpdateRefused
from edgecascade.fleet import envelopes, strict
from edgecascade.fleet.keys import public_key
from edgecascade.service import wire

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

SCHEMA = 1
PAYLOAD_TYPE = "application/vnd.edgecascade.order+json"
MAX_ORDER_BYTES = 32 << 10  # with the envelope's base64 and some signatures, below AWS's 128 KB
MAX_ENVELOPE_BYTES = 64 << 10
MAX_MIRRORS = 8
EPOCH_BITS = 32  # the upper bits of `seq` are the epoch of the keys: see OrderKeys

Action = Literal["install", "pause", "resume", "abort", "rollback"]

ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")  # of a bundle or version, and of its folder
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Window:
    """When a device may download and switch: from `start` for some minutes, on these days.

    The hours are the time zone's own, so a window keeps its hour when summer time begins.
    """

    tz: str  # Europe/Berlin
    start: str  # 01:30
    minutes: int
    days: tuple[int, ...] = ()  # Monday is 0; empty means every day

    def __post_init__(self) -> None:
        _require(re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", self.start), "start", self.start, "HH:MM")
        _require(1 <= self.minutes <= 1440, "minutes", self.minutes, "1 to 1440")
        days = all(0 <= day <= 6 for day in self.days) and len(set(self.days)) == len(self.days)
        _require(days, "days", self.days, "0 (Monday) to 6")
        _require(re.fullmatch(r"[A-Za-z0-9_+/-]{1,64}", self.tz), "tz", self.tz, "Europe/Berlin")

    @property
    def is_known(self) -> bool:
        """Whether this machine knows the time zone."""
        return _zone(self.tz) is not None

    def is_open(self, now: float) -> bool:
        """Whether a device may work now."""
        return any(begin <= now < end for begin, end in self._spans(now))

    def next_open(self, now: float) -> float:
        """When it is open next; `now` when it is open already."""
        return min(max(begin, now) for begin, end in self._spans(now) if end > now)

    def _spans(self, now: float) -> Iterable[tuple[float, float]]:
        # A zone that has left the machine since the order was taken counts as UTC.
        zone = _zone(self.tz) or timezone.utc
        hour, minute = (int(part) for part in self.start.split(":"))
        today = datetime.fromtimestamp(now, zone).date()
        # From yesterday, whose window may reach into today, for a week and a day.
        for offset in range(-1, 9):
            day = today + timedelta(days=offset)
            if not self.days or day.weekday() in self.days:
                # An hour that summer time leaves out begins when the clocks have moved.
                begin = datetime(day.year, day.month, day.day, hour, minute, tzinfo=zone)
                yield begin.timestamp(), begin.timestamp() + 60 * self.minutes


@dataclass(frozen=True)
class Cohort:
    """The part of a group that is concerned. A larger `percent` keeps everyone who was in."""

    salt: str
    percent: float

    def __post_init__(self) -> None:
        _require(len(self.salt) <= 64, "salt", self.salt, "at most 64 characters")
        _require(0 <= self.percent <= 100, "percent", self.percent, "0 to 100")

    def includes(self, device: str) -> bool:
        """Whether a device is in; each device decides for itself."""
        return point(self.salt, device) < self.percent


@dataclass(frozen=True)
class Limits:
    """How hard a device may pull."""

    kbit_s: int | None = None
    parallel: int = 4

    def __post_init__(self) -> None:
        rate = self.kbit_s is None or 1 <= self.kbit_s <= 10**9
        _require(rate, "kbit_s", self.kbit_s, "1 to 1,000,000,000, or null for no limit")
        _require(1 <= self.parallel <= 32, "parallel", self.parallel, "1 to 32")


@dataclass(frozen=True)
class Policy:
    """What a device does about trouble on the way; a bundle that fails its checks goes back."""

    retries: int = 3
    allow_downgrade: bool = False

    def __post_init__(self) -> None:
        _require(0 <= self.retries <= 100, "retries", self.retries, "0 to 100")


@dataclass(frozen=True)
class Order:
    """One order to the devices of a group."""

    order: str  # stays the same through all stages of a rollout
    seq: int  # grows with everything signed for the group
    group: str
    bundle: str
    version: str
    release_sha256: str
    not_before: float
    expires: float
    action: Action = "install"
    device: str | None = None  # only this one
    window: Window | None = None
    cohort: Cohort = field(default_factory=lambda: Cohort("", 100))
    limits: Limits = field(default_factory=Limits)
    policy: Policy = field(default_factory=Policy)
    mirrors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("order", "group"):
            _require(ID.fullmatch(getattr(self, name)), name, getattr(self, name), ID.pattern)
        device = self.device is None or ID.fullmatch(self.device)
        _require(device, "device", self.device, ID.pattern)
        for name in ("bundle", "version"):
            _require(NAME.fullmatch(getattr(self, name)), name, getattr(self, name), NAME.pattern)
        digest = SHA256.fullmatch(self.release_sha256)
        _require(digest, "release_sha256", self.release_sha256, "64 lower-case hex digits")
        _require(1 <= self.seq <= wire.MAX_INTEGER, "seq", self.seq, "1 to 2^53")
        times = 0 <= self.not_before < self.expires < math.inf
        _require(times, "expires", (self.not_before, self.expires), "after not_before")
        _require(len(self.mirrors) <= MAX_MIRRORS, "mirrors", len(self.mirrors), "at most 8")
        for mirror in self.mirrors:
            _require(is_mirror(mirror), "mirrors", mirror, "http(s)://host/folder/")

    @property
    def key(self) -> str:
        """The sequence that `seq` counts in. One for the whole group, whoever signs: else an old
        order of one operator could be replayed over a later one of another.
        """
        return self.group

    def concerns(self, device: str, groups: Iterable[str]) -> bool:
        """Whether a device is meant."""
        return (
            self.group in groups and self.device in (None, device) and self.cohort.includes(device)
        )


@dataclass(frozen=True)
class OrderKey:
    """A public key that may sign orders, for all groups or only for these."""

    owner: str
    public: str  # ed25519, 64 hex digits
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(ID.fullmatch(self.owner), "owner", self.owner, ID.pattern)
        _require(SHA256.fullmatch(self.public), "public", self.public, "64 hex digits")
        groups = all(ID.fullmatch(group) for group in self.groups)
        _require(groups, "groups", self.groups, ID.pattern)


@dataclass(frozen=True)
class OrderKeys:
    """Who may sign orders: a document that the targets role of the repository signs.

    A stolen key could sign the highest sequence number there is, and no later order would be
    obeyed. So the upper bits of a sequence number are the epoch; revoking a key begins the next.
    """

    threshold: int
    epoch: int
    keys: tuple[OrderKey, ...]

    def __post_init__(self) -> None:
        _require(0 <= self.epoch < 2**20, "epoch", self.epoch, "0 to 2^20")
        different = {key.public for key in self.keys}
        _require(len(different) == len(self.keys), "keys", len(self.keys), "different keys")
        enough = 1 <= self.threshold <= len(self.keys) <= 64
        _require(enough, "threshold", self.threshold, f"1 to {len(self.keys)} keys, at most 64")

    @property
    def first_seq(self) -> int:
        """The lowest sequence number of this epoch."""
        return max(1, self.epoch << EPOCH_BITS)

    def to_bytes(self) -> bytes:
        """The document as published."""
        return wire.encode({"schema": SCHEMA, **asdict(self)})

    @staticmethod
    def parse(data: bytes) -> OrderKeys:
        """The document as fetched.

        Raises:
            UpdateRefused: for anything else.
        """
        try:
            return strict.parse(OrderKeys, data, "order keys", schema=SCHEMA, limit=MAX_ORDER_BYTES)
        except strict.BadDocument as error:
            raise UpdateRefused(str(error), reason="malformed") from None


def point(salt: str, device: str) -> float:
    """Where a device lies between 0 and 100; operator and device compute the same."""
    digest = hashlib.sha256(f"{salt}\0{device}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48 * 100


def is_mirror(url: str) -> bool:
    """Whether a URL is one that blobs may be fetched from."""
    try:
        parts = urlsplit(url)
        return (
            len(url) <= 300
            and url.isascii()
            and not re.search(r"[\s\\\x00-\x20\x7f]", url)
            and parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.username is None
            and not parts.query
            and not parts.fragment
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:
        return False


def order_to_json(order: Order) -> dict[str, Any]:
    """An order as a JSON object."""
    return asdict(order)


def sign(order: Order, signers: Sequence[Signer]) -> bytes:
    """The envelope, the same bytes for the same order and keys.

    Raises:
        FleetError: for one too long to be read, or when the extra `fleet` is not installed.
    """
    body = wire.encode({"schema": SCHEMA, **order_to_json(order)})
    if len(body) > MAX_ORDER_BYTES:
        raise FleetError(f"an order of {len(body)} bytes; at most {MAX_ORDER_BYTES} are read")
    return envelopes.seal(body, PAYLOAD_TYPE, signers)


def verify(envelope: bytes, keys: OrderKeys, now: float) -> Order:
    """The order in an envelope, when enough keys for its group signed it and it is in force.

    Raises:
        UpdateRefused: with a `reason`: malformed, signature, epoch, time-zone, too-early, expired.
    """
    body, signers = _signed(envelope, keys)
    if len(signers) < keys.threshold:  # nobody's bytes are not worth a reader's time
        raise UpdateRefused(
            f"an order is signed by {len(signers)} keys that this fleet trusts, {keys.threshold} "
            "are needed; sign it with keys of the repository",
            reason="signature",
        )
    try:
        order = strict.parse(Order, body, "order", schema=SCHEMA, limit=MAX_ORDER_BYTES)
    except strict.BadDocument as error:
        raise UpdateRefused(str(error), reason="malformed") from None
    entitled = [key.owner for key in signers if not key.groups or order.group in key.groups]
    if len(entitled) < keys.threshold:
        raise UpdateRefused(
            f"order {order.order!r} for group {order.group!r} is signed by {len(entitled)} keys "
            f"that may, {keys.threshold} are needed; sign it with keys of the repository",
            reason="signature",
        )
    if order.seq >> EPOCH_BITS != keys.epoch:
        raise UpdateRefused(
            f"order {order.order!r} has seq {order.seq} of epoch {order.seq >> EPOCH_BITS}, the "
            f"keys are in epoch {keys.epoch}; sign it again with the present keys",
            reason="epoch",
        )
    if order.window and not order.window.is_known:
        raise UpdateRefused(
            f"order {order.order!r} has a window in {order.window.tz!r}, a time zone that this "
            "device does not know; install tzdata, or give the window in UTC",
            reason="time-zone",
        )
    if now < order.not_before:
        raise UpdateRefused(
            f"order {order.order!r} begins at {order.not_before:.0f}, it is {now:.0f}",
            reason="too-early",
        )
    if now >= order.expires:
        raise UpdateRefused(
            f"order {order.order!r} expired at {order.expires:.0f}, it is {now:.0f}; sign it again",
            reason="expired",
        )
    return order


def unverified(envelope: bytes) -> Order:
    """The order in an envelope that needs no proof: one's own.

    Raises:
        ValueError: when there is none.
    """
    body = envelopes.unproven(envelope)
    return strict.parse(Order, body, "order", schema=SCHEMA, limit=MAX_ORDER_BYTES)


def _signed(data: bytes, keys: OrderKeys) -> tuple[bytes, list[OrderKey]]:
    """The payload, and the keys whose signatures on it are good."""
    try:
        sealed = envelopes.read(data, PAYLOAD_TYPE, MAX_ENVELOPE_BYTES)
    except envelopes.BadEnvelope as error:
        raise UpdateRefused(f"this is no order: {error}", reason="malformed") from None
    return sealed.body, [key for key in keys.keys if sealed.is_signed_by(public_key(key.public))]


def _zone(name: str) -> ZoneInfo | None:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, OSError, ValueError):  # absent, a folder, no name at all
        return None


def _require(good: object, name: str, value: object, expected: str) -> None:
    if not good:
        raise ValueError(f"{name} is {value!r:.80}; expected {expected}")
