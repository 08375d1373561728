# SPDX-License-Identifier: Apache-2.0
"""Virtual devices on a thread of their own, and the broker to try them with."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgecascade.fleet.faults.virtual import Behaviour, VirtualFleet
from edgecascade.fleet.orders import OrderKeys

WAIT_S = 30.0


@contextmanager
def virtual_devices(
    port: int, keys: OrderKeys, count: int, *, group: str = "fleet", **behaviour: Any
) -> Iterator[VirtualFleet]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    how = Behaviour(**{"phase_s": 0.02, **behaviour})
    fleet = VirtualFleet(port, keys, group, how, now=time.time())
    try:
        asyncio.run_coroutine_threadsafe(fleet.connect(count), loop).result(WAIT_S)
        yield fleet
    finally:
        loop.call_soon_threadsafe(fleet.close)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.01), loop).result(WAIT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
