# SPDX-License-Identifier: Apache-2.0
"""A rollout's control traffic: thousands of virtual devices, one Mosquitto, one controller.

python benchmarks/fleet_scale.py [--devices 10000] [--json FILE]

Three processes: Mosquitto, the controller as `edgecascade fleet` runs it, and the devices, each
with a connection of its own. A good bundle goes to everybody, a bad one must stop; then a second
operator reads the whole fleet, and everybody loses power at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from edgecascade.fleet import orders, reports
from edgecascade.fleet.faults.virtual import Behaviour, VirtualFleet, signer_of
from edgecascade.fleet.jobs import Job
from edgecascade.fleet.keys import KeyFolders
from edgecascade.fleet.operator import Controller, Operator, Signing
from edgecascade.fleet.orders import Cohort, Order, OrderKey, OrderKeys
from edgecascade.fleet.record import Record, Records
from edgecascade.fleet.register import Register
from edgecascade.fleet.rollout import Plan, Progress, Thresholds
from edgecascade.fleet.view import View
from edgecascade.service.broker import LocalBroker, find_broker
from edgecascade.service.config import broker_address
from edgecascade.service.topics import Topics

GROUP = "fleet"
GOOD_SHARE = 0.02  # of the devices: the bad bundle fails from the next one on
WAIT_S = 3600.0
QUEUE = "max_queued_messages 100000\n"  # as in `edgecascade broker-config`
# Nobody is lost here, and a device whose process has to wait for its turn must not count as such.
LIMITS = Thresholds(lost_s=600.0, soak_s=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=10_000)
    parser.add_argument("--phase-s", type=float, default=1.0, help="of each of a device's phases")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--control", nargs=3, metavar="X", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.control:
        control(*args.control)
        return
    # The broker inherits it: a socket for each device.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalBroker(find_broker("mosquitto"), extra_config=QUEUE) as broker,
    ):
        result = asyncio.run(measure(Path(folder), broker, args.devices, args.phase_s))
    result |= {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
    for name, value in result.items():
        print(f"{name:36s} {value:,.3f}" if isinstance(value, float) else f"{name:36s} {value}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


async def measure(
    folder: Path, broker: LocalBroker, devices: int, phase_s: float
) -> dict[str, object]:
    key = KeyFolders([folder / "keys"]).generate("orders")
    keys = OrderKeys(1, 0, (OrderKey("operator", key.public),))
    (folder / "order-keys").write_bytes(keys.to_bytes())
    behaviour = Behaviour(phase_s=phase_s)
    fleet = VirtualFleet(broker.port, keys, behaviour=behaviour, now=time.time())
    started = time.perf_counter()
    Register(folder / "devices.json").enroll(fleet.keys_of(devices), time.time())
    enroll_s = time.perf_counter() - started
    watch = Watch(broker.pid)
    await fleet.connect(devices)
    result: dict[str, object] = {"devices": devices, "phase_s": phase_s, "enroll_s": enroll_s}
    connect_s, broker_s = watch.lap()
    result |= {"connect_s": connect_s, "connects_per_s": devices / connect_s}
    result |= {"connect_broker_cpu_s": broker_s, "broker_rss_mb": watch.rss_mb()}

    good = await roll_out(folder, broker, "good")
    wall_s, broker_s = watch.lap()
    assert good["state"] == "done", good
    assert fleet.exposed == devices == good["succeeded"], (fleet.exposed, good)
    result |= {"rollout_s": wall_s, "rollout_broker_cpu_s": broker_s}
    result |= {"rollout_controller_cpu_s": good["cpu_s"], "rollout_turns": good["turns"]}
    result |= {"verify_us": good["verify_us"], "not_believed": good["doubts"]}
    result |= {"reports": fleet.counts["reports"], "orders_delivered": fleet.counts["orders"]}
    result |= {"reports_per_s": fleet.counts["reports"] / wall_s}

    fleet.exposed = 0
    fleet.behaviour = replace(behaviour, fails=1.0, spared=int(GOOD_SHARE * devices))
    bad = await roll_out(folder, broker, "bad")
    watch.lap()
    assert bad["state"] == "aborted", bad
    stage = float(str(bad["percent"])) / 100
    result |= {"bad_after_percent": 100 * GOOD_SHARE, "bad_stopped_at_percent": bad["percent"]}
    result |= {"bad_reason": bad["reason"], "bad_exposed": fleet.exposed}
    assert GOOD_SHARE * devices < fleet.exposed <= (stage + 0.05) * devices, fleet.exposed

    started = time.perf_counter()
    seen = await asyncio.to_thread(look, folder, broker, devices)
    result |= {"second_operator_reads_s": time.perf_counter() - started, "devices_read": seen}
    started = time.perf_counter()
    fleet.close()
    gone = await asyncio.to_thread(wait_offline, folder, broker, devices)
    result |= {"power_cut_seen_s": time.perf_counter() - started, "wills_seen": gone}
    result |= {"broker_rss_after_mb": watch.rss_mb()}
    return result


def order_of(name: str) -> Order:
    return Order(
        order=name,
        seq=1,
        group=GROUP,
        bundle="model",
        version=name,
        release_sha256="0" * 64,
        not_before=0.0,
        expires=time.time() + 86_400,
        cohort=Cohort(name, 100),
    )


async def roll_out(folder: Path, broker: LocalBroker, name: str) -> dict[str, object]:
    """Start a controller as a process of its own and wait for its verdict."""
    order = order_of(name)
    records = Records(folder / "rollouts")
    with records.locked():
        seq = records.next_seq(GROUP, 1, time.time())
        records.write(Record(order, Plan(name, thresholds=LIMITS), Progress(seq)))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        "--control",
        str(folder),
        broker.url,
        name,
        stdout=subprocess.PIPE,
    )
    out, _ = await asyncio.wait_for(process.communicate(), WAIT_S)
    assert process.returncode == 0
    verdict: dict[str, object] = json.loads(out)
    return verdict


def control(folder: str, url: str, name: str) -> None:
    """The controller's process."""
    root = Path(folder)
    keys = OrderKeys.parse((root / "order-keys").read_bytes())
    signers = [key.signer for key in KeyFolders([root / "keys"]).keys("orders")]
    signing = Signing(
        lambda order: orders.sign(order, signers),
        lambda envelope: orders.verify(envelope, keys, time.time()),
        lambda: keys.first_seq,
    )
    turns = 0

    def count(turn: object) -> None:
        nonlocal turns
        turns += 1

    register = Register(root / "devices.json")
    with connect(root, url, name, "operator") as operator:
        operator.settle()
        records = Records(root / "rollouts")
        controller = Controller(operator, records, name, signing, root / "audit", register.read)
        turn = controller.run(count)
    used = resource.getrusage(resource.RUSAGE_SELF)
    progress, plan = turn.record.progress, turn.record.plan
    verdict = {
        "state": progress.state,
        "reason": progress.reason,
        "percent": plan.stages[progress.stage],
        "succeeded": turn.tally.succeeded,
        "cpu_s": used.ru_utime + used.ru_stime,
        "turns": turns,
        "doubts": turn.doubts,
        "verify_us": 1e6 * verify_s(register),
    }
    print(json.dumps(verdict))


def verify_s(register: Register, count: int = 1000) -> float:
    """Processor time to check one report, when nothing else is done."""
    (key, *_), ring = register.read().of(GROUP), register.read().keyring(GROUP)
    job = Job("good", 7, key.device, "SUCCEEDED", group=GROUP, release="0" * 64, version=7)
    report = reports.sign(job, signer_of(key.device))
    started = time.process_time()
    for _ in range(count):
        ring.verify(report)
    return (time.process_time() - started) / count


def connect(folder: Path, url: str, order: str, name: str) -> Operator:
    view = View(order_of(order), Register(folder / "devices.json").read())
    return Operator(broker_address(url), name, Topics(), view, group=GROUP, order=order)


def look(folder: Path, broker: LocalBroker, devices: int) -> int:
    """What a second operator sees of the finished rollout."""
    with connect(folder, broker.url, "good", "second") as operator:
        operator.settle()
        fleet = operator.look()
    assert len(fleet) == devices, len(fleet)
    return sum(seen.online and seen.job is not None for seen in fleet.values())


def wait_offline(folder: Path, broker: LocalBroker, devices: int) -> int:
    """Last wills, as an operator sees them."""
    end = time.monotonic() + WAIT_S
    with connect(folder, broker.url, "good", "third") as operator:
        operator.settle()  # who has not been heard of is not online either
        while time.monotonic() < end:
            gone = sum(not seen.online for seen in operator.look().values())
            if gone == devices:
                break
            operator.wait(0.1)
    return gone


class Watch:
    """Wall time, and the broker's processor time, since the last look."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._last = self._now()

    def lap(self) -> tuple[float, float]:
        now, before = self._now(), self._last
        self._last = now
        return now[0] - before[0], now[1] - before[1]

    def rss_mb(self) -> float:
        text = Path(f"/proc/{self._pid}/statm").read_text()
        return int(text.split()[1]) * resource.getpagesize() / 1e6

    def _now(self) -> tuple[float, float]:
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
