# SPDX-License-Identifier: Apache-2.0
"""Programs that a test needs and a machine may lack."""

from __future__ import annotations

import os

import pytest

from edgecascade.errors import NetworkError
from edgecascade.service.broker import BrokerProgram, find_broker


def broker(kind: str | None = "mosquitto") -> BrokerProgram:
    """A broker to test with. CI must have it; elsewhere its absence is a reason to skip."""
    try:
        return find_broker(kind)
    except NetworkError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))
