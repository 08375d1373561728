# SPDX-License-Identifier: Apache-2.0
"""A network that is cut, deaf, slow or late, between a device and its broker, and its mirror.

Half of the cases download a bundle through such a wire, which heals after a while; half hold a line
to a broker through it. In the end the blobs are right and the reports are where they belong.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from edgecascade.errors import DownloadFailed, NetworkError
from edgecascade.fleet.faults import Failure, Outcome
from edgecascade.fleet.faults.spoke import Hub, hear_of
from edgecascade.fleet.faults.web import Site
from edgecascade.fleet.faults.wire import Trouble, Wire, any_trouble
from edgecascade.fleet.fetch import Blob, Downloader, Pace
from edgecascade.fleet.sources import HttpSource, Patience
from edgecascade.service.broker import LocalBroker, find_broker

TITLE = "a network that is cut, deaf, slow or late"
FULL = 30
SHORT = 4

KINDS = ("cut", "reset", "deaf", "delay", "throttle")
BLOB_BYTES = 300_000
PATIENCE = Patience(connect_s=2, head_s=1, read_s=1, min_bytes_per_s=1000, window_s=2)
PACE = Pace(parallel=2, rounds=20, pause_s=0.05, longest_pause_s=0.2)
LINE_BYTES = 2000


def run(seed: int, count: int, case: str | None = None) -> Outcome:
    """See edgecascade.fleet.faults."""
    try:
        program = find_broker("mosquitto")
    except NetworkError as error:
        return Outcome(skipped=str(error))
    tried, failures = 0, []
    with ExitStack() as stack:
        broker = stack.enter_context(LocalBroker(program))
        wire = stack.enter_context(Wire(broker.port))
        hub = Hub(broker, f"mqtt://127.0.0.1:{wire.port}", 2, stack)
        for index in range(count):
            kind, what = KINDS[index // 2 % len(KINDS)], ("line", "mirror")[index % 2]
            name = f"{index}-{what}-{kind}"
            if case is not None and case != name:
                continue
            tried += 1
            rng = random.Random(f"{seed}-{name}")
            wrong = _line(hub, wire, rng, kind) if what == "line" else _mirror(rng, kind)
            if wrong:
                failures.append(Failure(name, wrong))
    return Outcome(tried, tuple(failures))


def _line(hub: Hub, wire: Wire, rng: random.Random, kind: str) -> str:
    """The wire is bad for a while, then the connections that hang are noticed and made anew."""
    wire.trouble = any_trouble(rng, kind, LINE_BYTES)
    hub.operator.announce(b"through-the-storm")
    for spoke in hub.spokes:
        spoke.hear(b"by-hand")
    time.sleep(rng.uniform(0.1, 0.5))
    wire.trouble = Trouble()
    if kind == "deaf":
        wire.cut()  # what keepalive does in the end
    return hear_of(hub.agree, hub.retained)


def _mirror(rng: random.Random, kind: str) -> str:
    files = {hashlib.sha256(d).hexdigest(): d for d in (rng.randbytes(BLOB_BYTES) for _ in (1, 2))}
    kept: dict[str, bytes] = {}

    def keep(blob: Blob, path: Path) -> None:
        kept[blob.sha256] = path.read_bytes()

    with tempfile.TemporaryDirectory() as place, Site(files) as site, Wire(site.port) as wire:
        wire.trouble = any_trouble(rng, kind, BLOB_BYTES)
        source = HttpSource(f"http://127.0.0.1:{wire.port}/", PATIENCE)
        heals = threading.Timer(rng.uniform(0.3, 1.0), lambda: _heal(wire))
        heals.start()
        try:
            blobs = [Blob(sha256, BLOB_BYTES) for sha256 in files]
            Downloader(Path(place), [source], pace=PACE, patience=PATIENCE).fetch(blobs, keep)
        except DownloadFailed as error:
            return f"failed: {error}"
        finally:
            heals.join()
    return "" if kept == files else "other bytes were kept"


def _heal(wire: Wire) -> None:
    wire.trouble = Trouble()
