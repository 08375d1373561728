# SPDX-License-Identifier: Apache-2.0
"""Whether a bundle is fit to be kept: tried in a child process, then watched while it serves.

The child may hang, crash, be wrong or take all memory; what comes back is evidence. It is the first
that the kernel kills when memory runs out, and it ends with the process that started it.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgecascade.device.facts import facts
from edgecascade.device.memory import memory_bytes
from edgecascade.fleet.release import GoldenPrompt, Health, Release
from edgecascade.service.leash import leashed

log = logging.getLogger(__name__)

POLL_S = 1.0
START_S = 120.0  # Python, the package, and hashing what was not hashed before
HASH_BYTES_PER_S = 50e6  # of a bundle on a slow card, when it is not in memory
ENGINE_S = 3600.0  # TensorRT may take long
SLOWEST_TOK_S = 0.2  # of a prompt, where the release asks for no rate
PROMPT_S = 30.0
KILL_S = 10.0
SPARE_BYTES = 1 << 30  # left to others where two bundles are in memory

Evidence = dict[str, Any]


@dataclass
class Trial:
    """One bundle on trial. `stop` may be called from any thread; nobody waits for its verdict.

    `options` are those of LLM.load, such as the backend; `command` is the program that is run.
    """

    folder: Path
    health: Health
    options: Mapping[str, Any] = field(default_factory=dict)
    command: Sequence[str] = (sys.executable, "-m", "edgecascade.fleet.trial")
    temperature: Callable[[], float | None] = lambda: facts().hottest_c
    _stopped: threading.Event = field(default_factory=threading.Event, init=False)

    def stop(self) -> None:
        """End it now."""
        self._stopped.set()

    def run(self) -> tuple[bool, Evidence]:
        """Try the bundle: whether it is fit, and what was seen."""
        engine = prepare(self.folder, stopped=self._stopped)
        if engine.get("reason"):
            return False, engine
        watched = _Watched(self.health, self.temperature)
        asked = {
            "folder": str(self.folder),
            "prompts": [asdict(prompt) for prompt in self.health.prompts],
            "options": dict(self.options),
        }
        allowed_s = START_S + self.health.load_s + _size(self.folder) / HASH_BYTES_PER_S
        child = _Child(self.command, asked)
        try:
            deadline = time.monotonic() + allowed_s
            while True:
                step = child.next(POLL_S)
                reason = "stopped" if self._stopped.is_set() else watched.look(child.pid)
                if reason:
                    return False, watched.evidence(reason)
                if step is not None:
                    reason, more_s = watched.take(step)
                    if reason or step["step"] in ("done", "failed"):
                        return not reason, watched.evidence(reason)
                    deadline = time.monotonic() + more_s if more_s else deadline
                elif child.ended:
                    return False, watched.evidence("crash", child.last_words())
                elif time.monotonic() > deadline:
                    return False, watched.evidence("hang")
        finally:
            child.kill()


def prepare(
    folder: Path,
    *,
    stopped: threading.Event | None = None,
    look: Sequence[str] = (sys.executable, "-m", "edgecascade.fleet.trial"),
    build: Sequence[str] = (sys.executable, "-m", "edgecascade", "engine"),
) -> Evidence:
    """Build the device's engine, unless the bundle has it: after an update, or of TensorRT.

    What went wrong is in `reason` and `message`; a bundle without an engine may still be served by
    another backend.
    """
    if find_spec("tensorrt") is None:
        return {}
    allowed_s = START_S + _size(folder) / HASH_BYTES_PER_S
    child = _Child(look, {"folder": str(folder)})
    try:
        step = child.until(allowed_s, stopped)
        if step is None or step["step"] != "engine":
            reason = "crash" if child.ended else "hang"
            words = child.last_words() if step is None else str(step.get("message", ""))
            return {"reason": reason if step is None else "load-failed", "message": words}
    finally:
        child.kill()
    if step["current"]:
        return {}
    log.info("building the engine of %s", folder)
    builder = _Child([*build, str(folder)], None)
    try:
        begin = time.monotonic()
        while not builder.ended and time.monotonic() - begin < ENGINE_S:
            if stopped is not None and stopped.is_set():
                return {"reason": "stopped"}
            builder.next(POLL_S)
        if not builder.ended or builder.status:
            return {"reason": "engine-failed", "message": builder.last_words()}
        return {"engine_s": round(time.monotonic() - begin, 1)}
    finally:
        builder.kill()


def soak(
    health: Health,
    trouble: Callable[[], str],
    wait: Callable[[float], bool],
    temperature: Callable[[], float | None] = lambda: facts().hottest_c,
) -> tuple[bool, Evidence]:
    """Watch the service for the soak time.

    `trouble` says what is wrong with it, such as a crash; `wait` sleeps, and says whether to stop.
    """
    hottest: float | None = None
    left_s = health.soak_s
    while True:
        hottest = max((t for t in (hottest, temperature()) if t is not None), default=None)
        seen = {"soak_s": health.soak_s - left_s, "hottest_c": hottest}
        message = trouble()
        if message:
            return False, {"reason": "crash-loop", "message": message, **seen}
        if _too_hot(health, hottest):
            return False, {"reason": "hot", **seen}
        if left_s <= 0:
            return True, seen
        pause_s = min(POLL_S, left_s)
        if wait(pause_s):
            return False, {"reason": "stopped", **seen}
        left_s -= pause_s


def room_for_two(release: Release) -> bool:
    """Whether memory has room for this bundle beside what runs."""
    available = memory_bytes()
    return available is not None and available > sum(release.blobs.values()) + SPARE_BYTES


@dataclass
class _Watched:
    """What was seen of a trial so far, held against what the release asks for."""

    health: Health
    temperature: Callable[[], float | None]
    seen: Evidence = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)

    def look(self, pid: int) -> str:
        """Memory and temperature now: the reason to end, or nothing."""
        used_mb = _resident_mb(pid)
        self._highest("peak_mb", used_mb)
        self._highest("hottest_c", self.temperature())
        if self.health.max_memory_mb and (used_mb or 0) > self.health.max_memory_mb:
            return "memory"
        return "hot" if _too_hot(self.health, self.seen.get("hottest_c")) else ""

    def take(self, step: Mapping[str, Any]) -> tuple[str, float]:
        """A step of the child: the reason to end, or how long the next step may take."""
        kind = step["step"]
        if kind == "failed":
            self.seen["message"] = step["message"]
            return "load-failed", 0.0
        if kind == "loaded":
            self.seen |= {"load_s": round(step["load_s"], 2), "backend": step["backend"]}
            if step["load_s"] > self.health.load_s:
                return "slow-load", 0.0
            return "", self._prompt_s(0)
        if kind == "answer":
            self.seen["prompts"] = number = step["number"] + 1
            if step["tok_s"]:
                self.rates.append(step["tok_s"])
                self.seen["tok_s"] = round(statistics.median(self.rates), 2)
            if step["wrong"]:
                self.seen["message"] = f"prompt {number}: {step['wrong']}"
                return "wrong-answer", 0.0
            return "", self._prompt_s(number)
        if kind == "done":
            return self._judge(), 0.0
        return "", 0.0

    def evidence(self, reason: str, message: str = "") -> Evidence:
        """What is reported."""
        said = {"reason": reason} if reason else {}
        return {**said, **({"message": message} if message else {}), **self.seen}

    def _judge(self) -> str:
        least, rate = self.health.min_tok_s, self.seen.get("tok_s", 0.0)
        if least and rate < least:
            self.seen["message"] = f"{rate} tokens/s, {least} are asked for"
            return "slow"
        return ""

    def _prompt_s(self, number: int) -> float:
        prompts: Sequence[GoldenPrompt] = self.health.prompts
        tokens = prompts[number].max_tokens if number < len(prompts) else 0
        return PROMPT_S + tokens / (self.health.min_tok_s / 2 or SLOWEST_TOK_S)

    def _highest(self, name: str, value: float | None) -> None:
        if value is not None:
            self.seen[name] = max(value, self.seen.get(name, value))


class _Child:
    """A program that takes one JSON object and says JSON lines; its process group dies as one."""

    def __init__(self, command: Sequence[str], asked: Mapping[str, Any] | None) -> None:
        with tempfile.TemporaryFile() as stdin:  # a pipe would wait for a child that hangs
            stdin.write(b"" if asked is None else json.dumps(asked).encode())
            stdin.seek(0)
            self._process = subprocess.Popen(
                leashed(command),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        self.pid = self._process.pid
        _first_to_be_killed(self.pid)
        self._steps: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._errors = b""
        self._readers = [
            threading.Thread(target=read, daemon=True) for read in (self._read, self._read_errors)
        ]
        for reader in self._readers:
            reader.start()

    @property
    def status(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._process.poll()

    @property
    def ended(self) -> bool:
        """Whether it is over and all it said was taken."""
        return self.status is not None and not self._readers[0].is_alive() and self._steps.empty()

    def next(self, wait_s: float) -> dict[str, Any] | None:
        """Its next step, if one comes in time."""
        try:
            return self._steps.get(timeout=0.05 if self.status is not None else wait_s)
        except queue.Empty:
            return None

    def until(self, allowed_s: float, stopped: threading.Event | None) -> dict[str, Any] | None:
        """Its next step; None when it ends, hangs or is to stop before."""
        begin = time.monotonic()
        while time.monotonic() - begin < allowed_s and not (stopped and stopped.is_set()):
            step = self.next(POLL_S)
            if step is not None or self.ended:
                return step
        return None

    def last_words(self) -> str:
        """How it ended, and the end of what it said on stderr."""
        self._readers[1].join(KILL_S)
        text = self._errors[-600:].decode(errors="replace").strip()
        return f"status {self.status}: {text}" if text else f"status {self.status}"

    def kill(self) -> None:
        """End it and whatever it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(KILL_S)
        for reader in self._readers:
            reader.join(KILL_S)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline(1 << 16):
            try:
                step = json.loads(line)
                if isinstance(step, dict) and "step" in step:
                    self._steps.put(step)
            except ValueError:
                log.warning("a trial said %r", line[:100])

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        while block := os.read(self._process.stderr.fileno(), 1 << 16):
            self._errors = (self._errors + block)[-4096:]


def _too_hot(health: Health, hottest_c: float | None) -> bool:
    return bool(health.max_temp_c) and hottest_c is not None and hottest_c > health.max_temp_c


def _first_to_be_killed(pid: int) -> None:
    try:
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
    except OSError as error:
        log.debug("oom_score_adj of %d: %s", pid, error)


def _resident_mb(pid: int) -> int | None:
    """Memory of the process itself, without the weights, which the page cache could give back."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) >> 10
    except (OSError, ValueError):
        pass
    return None


def _size(folder: Path) -> int:
    try:
        return sum(entry.stat().st_size for entry in folder.iterdir())
    except OSError:
        return 0
