# SPDX-License-Identifier: Apache-2.0
"""A broker that is killed, stopped, forgets everything, or lets a thief in.

After each of these the next order reaches every device, and every device's last report is there for
whoever connects.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

from edgecascade.errors import NetworkError
from edgecascade.fleet.faults import Failure, Outcome
from edgecascade.fleet.faults.spoke import BOUND_S, Hub, hear_of
from edgecascade.fleet.faults.wire import until
from edgecascade.service.broker import LocalBroker, find_broker
from edgecascade.service.config import broker_address
from edgecascade.service.mqtt import Link, LinkOptions

TITLE = "a broker that is killed, stopped, forgets, or lets a thief in"
FULL = 30
SHORT = 3

DEVICES = 3


def run(seed: int, count: int, case: str | None = None) -> Outcome:
    """See edgecascade.fleet.faults."""
    try:
        program = find_broker("mosquitto")
    except NetworkError as error:
        return Outcome(skipped=str(error))
    tried, failures = 0, []
    with ExitStack() as stack:
        broker = stack.enter_context(LocalBroker(program))
        hub = Hub(broker, broker.url, DEVICES, stack)
        for index in range(count):
            name, act = ACTS[index % len(ACTS)]
            if case is not None and case != f"{index}-{name}":
                continue
            tried += 1
            rng = random.Random(f"{seed}-{index}")
            act(hub, rng)
            wrong = hear_of(hub.agree, hub.retained)
            if wrong:
                failures.append(Failure(f"{index}-{name}", wrong))
    return Outcome(tried, tuple(failures))


def _killed(hub: Hub, rng: random.Random) -> None:
    """SIGKILL while messages are on their way; nothing was on its disk."""
    hub.operator.announce(b"on-the-way")
    time.sleep(rng.uniform(0, 0.05))
    hub.broker.kill()
    hub.broker.start()


def _killed_long(hub: Hub, rng: random.Random) -> None:
    """It stays away; what is reported meanwhile must not be lost."""
    hub.broker.kill()
    for spoke in hub.spokes:
        spoke.hear(b"by-hand")
    time.sleep(rng.uniform(0.2, 1.0))
    hub.broker.start()


def _stopped(hub: Hub, rng: random.Random) -> None:
    """SIGSTOP: connections stay open, and nobody answers."""
    os.kill(hub.broker.pid, signal.SIGSTOP)
    hub.operator.announce(b"into-the-void")
    time.sleep(rng.uniform(0.2, 1.0))
    os.kill(hub.broker.pid, signal.SIGCONT)


def _session_lost(hub: Hub, rng: random.Random) -> None:
    """A clean start under the agent's name ends its session, then goes away itself."""
    _thief(hub, rng, stays_s=0.0)


def _taken_over(hub: Hub, rng: random.Random) -> None:
    """Somebody connects under an agent's name, where no certificate keeps him from it."""
    _thief(hub, rng, stays_s=rng.uniform(0.1, 0.5))


def _thief(hub: Hub, rng: random.Random, *, stays_s: float) -> None:
    spoke = rng.choice(hub.spokes)
    name = spoke.settings.name
    options = LinkOptions(broker_address(hub.broker.url), name, (), forget=True)
    thief = Link(options, lambda message: None)
    thief.start()
    thief.wait_up(BOUND_S)
    time.sleep(stays_s)
    thief.stop()
    if until(lambda: spoke.line.fatal is not None, 1.0):
        spoke.restart()  # what systemd does when the agent ends with that error


def _crowd(hub: Hub, rng: random.Random) -> None:
    """All connect again at once, and the broker dies among them."""
    threads = [threading.Thread(target=spoke.restart) for spoke in hub.spokes]
    for thread in threads:
        thread.start()
    time.sleep(rng.uniform(0, 0.2))
    hub.broker.kill()
    hub.broker.start()
    for thread in threads:
        thread.join()


ACTS: tuple[tuple[str, Callable[[Hub, random.Random], None]], ...] = (
    ("killed", _killed),
    ("stopped", _stopped),
    ("taken-over", _taken_over),
    ("killed-long", _killed_long),
    ("session-lost", _session_lost),
    ("crowd", _crowd),
)
