# SPDX-License-Identifier: Apache-2.0
"""What the fixtures of conftest.py give, and how long a test waits for anything."""

from __future__ import annotations

from collections.abc import Callable

from edgecascade.client import Client
from edgecascade.service.service import Service

WAIT_S = 30.0
Serve = Callable[..., Service]
Connect = Callable[..., Client]
