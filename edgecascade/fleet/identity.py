# SPDX-License-Identifier: Apache-2.0
"""A device's own key, with which it signs its reports: <root>/identity/device-N.pem.

It is made on the device and never leaves it; what leaves is an enrolment, which holds the public
half. It has nothing to do with certificates of a broker.
"""

from __future__ import annotations

import logging
from pathlib import Path

from edgecascade.errors import FleetError
from edgecascade.files import replace_file
from edgecascade.fleet import reports
from edgecascade.fleet.keys import Key, KeyFolders
from edgecascade.fleet.reports import DeviceKey
from edgecascade.fleet.settings import AgentSettings

log = logging.getLogger(__name__)

FOLDER = "identity"
ROLE = "device"


def own_key(root: Path) -> Key:
    """The device's key, made if there is none. The caller owns the root.

    A damaged one is put aside and replaced: the robot goes on, and its operator sees reports that
    are not believed until it is enrolled again.

    Raises:
        FleetError: when others can read it.
    """
    try:
        known = stored_key(root)
    except FleetError as error:
        if error.reason != "key":
            raise
        log.error("%s; a new key is made: enroll this device again", error)
        for path in (root / FOLDER).glob(f"{ROLE}-*.pem"):
            path.rename(path.with_suffix(".damaged"))
        known = None
    return known or _folder(root).generate(ROLE)


def stored_key(root: Path) -> Key | None:
    """The device's key, if it was made.

    Raises:
        FleetError: when it is damaged, or others can read it.
    """
    return next(iter(_folder(root).keys(ROLE)), None)


def enrolment(settings: AgentSettings, key: Key) -> bytes:
    """What the operator enrolls."""
    device = DeviceKey(settings.device_id, settings.name, key.public, settings.groups)
    return reports.sign_enrolment(device, key.signer)


def put_enrolment(folder: str, settings: AgentSettings, key: Key) -> Path:
    """Write it as DEVICE.enroll.json, such as on a stick; it is there when this returns."""
    path = Path(folder, f"{settings.device_id}.enroll.json")
    replace_file(path, enrolment(settings, key) + b"\n")
    return path


def _folder(root: Path) -> KeyFolders:
    return KeyFolders([root / FOLDER])
