# SPDX-License-Identifier: Apache-2.0
"""A fleet, end to end: real agents and services, Mosquitto, an HTTP server, the demo's bundles.

Publishes, rolls out, and then tries what must fail: wrong answers, corrupted and dead mirrors, an
order of a revoked key; at last every agent is killed in the middle of an update. Every device must
end where it should, with a report that says why.

    python benchmarks/fleet.py --devices 20 --json result.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgecascade.client import Client
from edgecascade.errors import EdgeCascadeError, ReportRefused
from edgecascade.fleet import orders
from edgecascade.fleet.home import Home
from edgecascade.fleet.jobs import ENDED, Job
from edgecascade.fleet.orders import Order, Policy
from edgecascade.fleet.release import Health, Release
from edgecascade.fleet.reports import Keyring
from edgecascade.fleet.repository import Offer
from edgecascade.service import wire
from edgecascade.service.broker import LocalBroker, free_port
from edgecascade.service.config import broker_address
from edgecascade.service.mqtt import Link, LinkOptions
from edgecascade.service.protocol import Incoming
from edgecascade.service.replies import Outgoing
from edgecascade.service.topics import Topics

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "examples" / "tiny" / "checkpoint"
PROGRAM = [sys.executable, "-m", "edgecascade"]
GROUP, NAME = "lab", "tiny"
TOPICS = Topics()
PROMPT = "Drive to the charging dock."
STOP_S = 60.0
KILL_S = 4.0  # within about so long after an order


class Failure(Exception):
    """Something is not as it must be."""


@dataclass
class Watcher:
    """What the devices report."""

    jobs: dict[tuple[str, str], Job] = field(default_factory=dict)
    statuses: dict[str, dict[str, Any]] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)
    ring: Keyring = field(default_factory=lambda: Keyring([]))

    def _proven(self, payload: bytes) -> Job | None:
        try:
            return self.ring.verify(payload)
        except ReportRefused:
            return None

    def hear(self, message: Incoming) -> None:
        address = TOPICS.parse(message.topic)
        if address is None or not message.payload:
            return
        with self.changed:
            if address.kind == "job" and (job := self._proven(message.payload)) is not None:
                self.jobs[job.device, job.order] = job
            elif address.kind == "status":
                body = wire.decode(message.payload)
                if body.get("kind") == "agent":
                    self.statuses[body["device"]] = body
            self.changed.notify_all()

    def wait(self, what: str, test: Callable[[], bool], timeout_s: float) -> None:
        with self.changed:
            if not self.changed.wait_for(test, timeout_s):
                raise Failure(f"{what}: not within {timeout_s:g} s; {self.summary()}")

    def summary(self) -> str:
        return "; ".join(
            f"{device} {order}: {job.state} {job.phase} {dict(job.evidence)}"
            for (device, order), job in sorted(self.jobs.items())
            if job.state not in ("SUCCEEDED",)
        )[:2000]


class Fleet:
    """Devices, each with a folder, an agent and a service of its own."""

    def __init__(self, place: Path, count: int, timeout_s: float, stack: ExitStack) -> None:
        self.place, self.timeout_s, self._stack = place, timeout_s, stack
        self.names = [f"device-{i:02}" for i in range(count)]
        self.home = Home(place / "fleet")
        self.results: dict[str, Any] = {"devices": count, "acts": {}}
        self.broker = stack.enter_context(LocalBroker())
        self.watcher = Watcher()
        filters = (TOPICS.job("+", "+"), TOPICS.status("+"), TOPICS.announce(GROUP))
        options = LinkOptions(broker_address(self.broker.url), "watcher", filters, forget=True)
        self.link = Link(options, self.watcher.hear)
        self.link.start()
        stack.callback(self.link.stop)
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        self._run("fleet", "init", *self._fleet())
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/"
        self._spawn(
            [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1",
             "--directory", str(self.home.served)], "http")  # fmt: skip
        for name in self.names:
            self._run("agent", "enroll", str(self.place), *self._identity(name))
        files = [str(self.place / f"{name}.enroll.json") for name in self.names]
        self._run("fleet", "devices", *self._fleet(), "--enroll", *files)
        self.watcher.ring = self.home.register.read().keyring(GROUP)
        for name in self.names:
            self.agents[name] = self._agent(name)
        online = self.watcher.statuses
        self.watcher.wait(
            "all agents online",
            lambda: sum(s["status"] == "online" for s in online.values()) == len(self.names),
            self.timeout_s,
        )

    def _identity(self, name: str) -> list[str]:
        return ["--root", str(self.place / name), "--device-id", name, "--group", GROUP]

    def _agent(self, name: str) -> subprocess.Popen[bytes]:
        words = self._identity(name)
        words += ["--mqtt", self.broker.url, "--repository", self.url]
        words += ["--trust", str(self.home.folder / "root.json")]
        return self._spawn([*PROGRAM, "-v", "agent", *words], name)

    def _fleet(self) -> list[str]:
        return ["--fleet", str(self.home.folder)]

    def _run(self, *words: str) -> str:
        done = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failure(f"{' '.join(words)}: {done.returncode} {done.stderr} {done.stdout}")
        return done.stdout

    def _spawn(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        log = self._stack.enter_context((self.place / f"{name}.log").open("ab"))
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._stack.callback(_end, process)
        self._stack.callback(process.terminate)  # all of them first
        return process

    def publish(self, bundle: Path, version: str) -> Release:
        self._run("fleet", "publish", *self._fleet(), str(bundle), "--name", NAME,
                  "--version", version, "--golden", PROMPT)  # fmt: skip
        return self.home.repository().release(NAME, version)[0]

    def rollout(self, version: str, order: str) -> None:
        self._run("fleet", "rollout", *self._fleet(), NAME, version, "--group", GROUP, "--order",
                  order, "--stages", "first,25,100", "--soak", "0", "--lost-after", "600",
                  "--mqtt", self.broker.url, "--json")  # fmt: skip

    def order(self, name: str, version: str, **changes: Any) -> Order:
        repository = self.home.repository()
        _, sha256 = repository.release(NAME, version)
        now = time.time()
        order = Order(
            name, repository.next_seq(GROUP), GROUP, NAME, version, sha256, now - 60, now + 3600,
            policy=Policy(retries=0),
        )  # fmt: skip
        return replace(order, **changes)

    def announce(self, envelope: bytes) -> None:
        self.link.publish(Outgoing(TOPICS.announce(GROUP), envelope, retain=True))

    def ended(self, order: str) -> dict[str, Job]:
        """The reports of all devices about an order, once it has ended everywhere."""
        jobs = self.watcher.jobs

        def over() -> bool:
            return all(
                (name, order) in jobs and jobs[name, order].state in ENDED for name in self.names
            )

        self.watcher.wait(f"{order} ends", over, self.timeout_s)
        return {name: jobs[name, order] for name in self.names}

    def answers(self, manifest: str) -> None:
        """Every device answers, with this bundle."""
        with Client(self.broker.url, client_id="asker") as client:
            for name in self.names:
                answer = client.chat(
                    name, "Where?", max_completion_tokens=4, timeout_s=self.timeout_s
                )
                _check(f"{name} answers with {manifest}", answer.body["bundle"], manifest)

    def status_shows(self, release: Release) -> None:
        """`fleet status` says of every device that all is well, on this bundle, as it signed."""
        end, expected = time.monotonic() + self.timeout_s, f"{NAME} {release.version}"
        while True:
            said = self._run("fleet", "status", *self._fleet(), "update", "--mqtt",
                             self.broker.url, "--json")  # fmt: skip
            found = {
                name: (device["trouble"], (device["standing"] or {}).get("bundle"))
                for name, device in json.loads(said)["devices"].items()
            }
            if set(found.values()) == {("", expected)}:
                return
            if time.monotonic() > end:
                raise Failure(f"fleet status shows {found}, expected {expected}")

    def act(self, name: str, facts: dict[str, Any], began: float) -> None:
        facts["seconds"] = round(time.monotonic() - began, 1)
        self.results["acts"][name] = facts
        print(f"{name:18} {json.dumps(facts)}", flush=True)

    def first_installation(self, release: Release) -> None:
        began = time.monotonic()
        self.rollout(release.version, "first")
        jobs = self.ended("first")
        _check("states", {job.state for job in jobs.values()}, {"SUCCEEDED"})
        self.answers(release.manifest.sha256)
        self.act("first installation", {"succeeded": len(jobs)}, began)

    def update(self, release: Release) -> None:
        began = time.monotonic()
        with self.asking(self.names[0]) as gaps:
            self.rollout(release.version, "update")
            jobs = self.ended("update")
        _check("states", {job.state for job in jobs.values()}, {"SUCCEEDED"})
        self.answers(release.manifest.sha256)
        down = sorted(float(job.evidence["down_s"]) for job in jobs.values())
        facts = {
            "succeeded": len(jobs),
            "down_s": {"median": down[len(down) // 2], "max": down[-1]},
            "answered_while_updating": len(gaps),
            "longest_answer_s": round(max(gaps), 2),
        }
        self.act("update", facts, began)

    @contextmanager
    def asking(self, device: str) -> Iterator[list[float]]:
        """Somebody asks all the time; how long each answer took. A retry bridges the switch."""
        gaps: list[float] = []
        over = threading.Event()

        def ask() -> None:
            with Client(self.broker.url, client_id="patient") as client:
                while not over.is_set():
                    began = time.monotonic()
                    try:
                        client.chat(device, "Hello.", max_completion_tokens=4,
                                    timeout_s=self.timeout_s)  # fmt: skip
                    except EdgeCascadeError as error:
                        errors.append(str(error))
                    gaps.append(time.monotonic() - began)
                    over.wait(0.2)

        errors: list[str] = []
        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield gaps
        finally:
            over.set()
            thread.join()
        _check("a client that retries gets every answer", errors, [])

    def fails(
        self, name: str, envelope: bytes, order: str, state: str, reasons: set[str], old: Release
    ) -> None:
        began = time.monotonic()
        self.announce(envelope)
        jobs = self.ended(order)
        _check(f"{name}: states", {job.state for job in jobs.values()}, {state})
        told = {str(job.evidence["reason"]) for job in jobs.values()}
        if not told <= reasons:
            raise Failure(f"{name}: reported {told}, expected {reasons}; {self.watcher.summary()}")
        for job in jobs.values():
            if not job.evidence.get("message"):
                raise Failure(f"{name}: {job.device} does not say why")
        self.answers(old.manifest.sha256)
        example = next(iter(jobs.values())).evidence
        self.act(name, {"state": state, "reasons": sorted(told), "says": example["message"][:160]},
                 began)  # fmt: skip

    def bad_bundle(self, bundle: Path, old: Release) -> None:
        good = self.home.repository().release(NAME, "1")[0].health.prompts
        wrong = tuple(
            replace(prompt, tokens=tuple(token + 1 for token in prompt.tokens)) for prompt in good
        )
        offer = Offer(NAME, "3", health=Health(prompts=wrong))
        self.home.repository().publish(bundle, offer, time.time())
        signed = self.home.repository().sign_order(self.order("bad-bundle", "3"))
        self.fails("bad bundle", signed, "bad-bundle", "FAILED", {"wrong-answer"}, old)

    def corrupted_mirror(self, bundle: Path, old: Release) -> None:
        release = self.publish(bundle, "4")
        for sha256 in release.blobs.keys() - old.blobs.keys():
            path = self.home.served / "blobs" / sha256
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.unlink()  # it may be a link to the bundle
            path.write_bytes(data)
        signed = self.home.repository().sign_order(self.order("corrupted", "4"))
        self.fails("corrupted mirror", signed, "corrupted", "FAILED", {"wrong-hash"}, old)

    def dead_mirror(self, bundle: Path, old: Release) -> None:
        release = self.publish(bundle, "5")
        for sha256 in release.blobs.keys() - old.blobs.keys():
            (self.home.served / "blobs" / sha256).unlink()
        dead = (f"http://127.0.0.1:{free_port()}/",)
        signed = self.home.repository().sign_order(self.order("dead", "5", mirrors=dead))
        self.fails("dead mirror", signed, "dead", "FAILED", {"no-mirror"}, old)

    def revoked_key(self, old: Release) -> None:
        repository = self.home.repository()
        key = repository.add_order_key("former", time.time())
        order = self.order("revoked", "1")
        signed = orders.sign(order, [key.signer])
        repository.revoke_order_key("former", time.time())
        self.fails("revoked key", signed, "revoked", "REJECTED", {"signature", "epoch"}, old)

    def killed(self, release: Release) -> None:
        """A good order still goes through, though each agent is killed on the way."""
        began = time.monotonic()
        repository, rng = self.home.repository(), random.Random(1)
        order = self.order("back", "1", policy=Policy(retries=0, allow_downgrade=True))
        self.announce(repository.sign_order(order))
        phases = []
        for name in rng.sample(self.names, len(self.names)):
            time.sleep(rng.uniform(0, 2 * KILL_S / len(self.names)))
            job = self.watcher.jobs.get((name, "back"))
            phases.append("" if job is None else job.phase or job.state)
            self.agents[name].kill()
            self.agents[name].wait()
            self.agents[name] = self._agent(name)
        jobs = self.ended("back")
        _check("states", {job.state for job in jobs.values()}, {"SUCCEEDED"})
        self.answers(release.manifest.sha256)
        self.act("killed agents", {"succeeded": len(jobs), "killed_in": phases}, began)


def _check(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise Failure(f"{what}: {found!r}, expected {expected!r}")


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _build(place: Path, precision: str) -> Path:
    from build_engine.pipeline import build

    out = place / precision
    build(CHECKPOINT, out, precision=precision)
    return out


def run(place: Path, devices: int, timeout_s: float) -> dict[str, Any]:
    began = time.monotonic()
    with ExitStack() as stack:
        fleet = Fleet(place, devices, timeout_s, stack)
        speed, balanced, quality, exact = (
            _build(place, name) for name in ("speed", "balanced", "quality", "exact")
        )
        fleet.start()
        old = fleet.publish(speed, "1")
        fleet.first_installation(old)
        current = fleet.publish(balanced, "2")
        fleet.update(current)
        fleet.status_shows(current)
        fleet.bad_bundle(speed, current)
        fleet.corrupted_mirror(quality, current)
        fleet.dead_mirror(exact, current)
        fleet.revoked_key(current)
        fleet.killed(old)
        fleet.status_shows(old)
        fleet.results["seconds"] = round(time.monotonic() - began, 1)
        return fleet.results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=20)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds, of each act")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--keep", metavar="FOLDER", help="work here, and leave everything there")
    args = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    with ExitStack() as stack:
        if args.keep:
            place = Path(args.keep)
            place.mkdir(parents=True)
        else:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-")))
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        try:
            results = run(place, args.devices, args.timeout)
        except Failure as failure:
            print(f"FAIL: {failure}", flush=True)
            return 1
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    print(f"PASS: {args.devices} devices, {results['seconds']:g} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
