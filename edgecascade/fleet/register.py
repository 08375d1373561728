# SPDX-License-Identifier: Apache-2.0
"""The devices of a fleet as their operator enrolled them: FLEET/devices.json.

Who is in a group, and so what a stage of a rollout is a share of, is said here and not by the
broker. A revoked device stays in the file, so that its key is never enrolled again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from edgecascade.errors import FleetError, InvalidRequest
from edgecascade.files import canonical_json, replace_file
from edgecascade.fleet import strict
from edgecascade.fleet.locked import locked
from edgecascade.fleet.reports import DeviceKey, Keyring

SCHEMA = 1


@dataclass(frozen=True)
class Enrolled:
    """A device's key, since when it counts, and since when it does not any more."""

    key: DeviceKey
    since: float
    revoked: float | None = None


@dataclass(frozen=True)
class Devices:
    """All that were ever enrolled, in the order of their names."""

    entries: tuple[Enrolled, ...] = ()

    @property
    def revoked(self) -> tuple[DeviceKey, ...]:
        """Keys that count no more."""
        return tuple(each.key for each in self.entries if each.revoked is not None)

    def of(self, group: str) -> tuple[DeviceKey, ...]:
        """The devices of a group."""
        return tuple(
            each.key for each in self.entries if each.revoked is None and group in each.key.groups
        )

    def keyring(self, group: str) -> Keyring:
        """Whose reports are believed about orders to a group."""
        return Keyring(self.of(group), self.revoked)

    def with_keys(self, keys: Iterable[DeviceKey], now: float) -> Devices:
        """With devices more, or with other groups for those that are there.

        Raises:
            FleetError: when a name has another key, or a key another name, or is revoked.
        """
        by_key = {each.key.public: each for each in self.entries}
        holders = {each.key.device: each for each in self.entries if each.revoked is None}
        at_broker = {name: each for each in holders for name in (each, holders[each].key.agent)}
        for key in keys:
            _check(key, by_key.get(key.public), holders.get(key.device))
            for name in (key.device, key.agent):
                _check_free(name, key, at_broker.setdefault(name, key.device))
            holders[key.device] = by_key[key.public] = Enrolled(key, now)
        return _sorted(by_key.values())

    def without(self, device: str, now: float) -> Devices:
        """With a device revoked.

        Raises:
            InvalidRequest: when there is none of the name.
        """
        found = [
            each for each in self.entries if each.key.device == device and each.revoked is None
        ]
        if not found:
            raise InvalidRequest(f"no device {device!r} is enrolled")
        kept = (each for each in self.entries if each not in found)
        return _sorted((*kept, *(replace(each, revoked=now) for each in found)))


class Register:
    """The file. What was read is kept until the file changes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: tuple[int, ...] = ()
        self._devices = Devices()

    def read(self) -> Devices:
        """The devices; none where there is no file.

        Raises:
            FleetError: when it is damaged.
        """
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return Devices()
        state = found.st_ino, found.st_mtime_ns, found.st_size
        if state != self._state:
            self._devices = _parse(self.path.read_bytes(), self.path)
            self._state = state
        return self._devices

    def enroll(self, keys: Iterable[DeviceKey], now: float) -> Devices:
        """Add devices, all or none."""
        with self._locked():
            devices = self.read().with_keys(keys, now)
            self._write(devices)
            return devices

    def revoke(self, names: Iterable[str], now: float) -> Devices:
        """Believe these devices no more, and count them no more."""
        with self._locked():
            devices = self.read()
            for name in names:
                devices = devices.without(name, now)
            self._write(devices)
            return devices

    def _write(self, devices: Devices) -> None:
        replace_file(self.path, canonical_json({"schema": SCHEMA, **asdict(devices)}))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not self.path.parent.is_dir():
            raise InvalidRequest(
                f"there is no {self.path.parent}; --fleet names the operator's folder, which "
                "edgecascade fleet init makes"
            )
        with locked(self.path.with_suffix(".lock"), self.path):
            yield


def _check(key: DeviceKey, same: Enrolled | None, holder: Enrolled | None) -> None:
    """Whether a key can be enrolled where `same` has it already, and `holder` its name."""
    if same is not None and same.revoked is not None:
        raise FleetError(
            f"the key of {key.device} was revoked; remove the folder identity/ on the device and "
            "enroll it again",
            reason="revoked",
        )
    if same is not None and same.key.device != key.device:
        raise FleetError(
            f"{key.device} has the key of {same.key.device}: an image was copied, or a device "
            "renamed; remove the folder identity/ on it and enroll it again",
            reason="key-shared",
        )
    if holder is not None and holder.key.public != key.public:
        raise FleetError(
            f"{key.device} is enrolled with another key; if the new one is meant: "
            f"edgecascade fleet devices --revoke {key.device}, then enroll it again",
            reason="exists",
        )


def _check_free(name: str, key: DeviceKey, holder: str) -> None:
    """Whether a device or its agent can have a name at the broker that `holder` has there."""
    if holder != key.device:
        raise FleetError(
            f"{name!r} cannot be a name of {key.device} at the broker: {holder} or its agent has "
            "it; set another device_id or agent_id and enroll it again",
            reason="exists",
        )


def _sorted(entries: Iterable[Enrolled]) -> Devices:
    return Devices(tuple(sorted(entries, key=lambda each: (each.key.device, each.since))))


def _parse(data: bytes, path: Path) -> Devices:
    try:
        raw = json.loads(data)
        if raw.pop("schema") != SCHEMA:
            raise ValueError("it was written by another version")
        return strict.read(Devices, raw, "devices")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise FleetError(
            f"{path} is damaged: {error}; restore it from a copy", reason="register"
        ) from None
