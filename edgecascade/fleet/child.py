# SPDX-License-Identifier: Apache-2.0
"""Keeps one program running: started, watched, started again, ended. Here that is `serve`.

    child.want(command)     from now on this one, and no other; returns at once
    child.state             what became of it
    child.end(30)           let it finish its work, then make it end

It speaks systemd's language to us: STATUS=loaded, READY=1 and WATCHDOG=1 (service/units.py). It
ends when we do, whatever way that is, so that no two services have one device's name.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from edgecascade.backoff import backoff_s
from edgecascade.service.leash import leashed

log = logging.getLogger(__name__)

TURN_S = 0.2
WATCHDOG_S = 30.0  # without a sign of life for so long, once it is loaded, it hangs
FIRST_PAUSE_S = 0.5  # before it is started again; doubled for each further time
LONGEST_PAUSE_S = 30.0
STEADY_S = 60.0  # a run of this length begins the count anew
TAIL_BYTES = 2000
MAX_LOG_BYTES = 1 << 20

Command = tuple[str, ...]


@dataclass(frozen=True)
class ChildState:
    """How the program is. Times are time.monotonic()."""

    command: Command | None = None  # what runs, or is about to be started again
    pid: int | None = None
    started_at: float = 0.0
    loaded_at: float | None = None  # the bundle is in memory
    ready_at: float | None = None  # and the broker knows it
    ended_at: float = 0.0  # when the last one ended
    crashes: int = 0  # since this command was wanted
    last_words: str = ""  # how the last crash looked


class Child:
    """One program at a time. Its methods may be called from any thread.

    `before` is called before each start, and should end when its event is set.
    """

    def __init__(
        self,
        *,
        environment: Mapping[str, str] | None = None,
        grace_s: float = 40.0,
        before: Callable[[Command, threading.Event], None] = lambda command, stopped: None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._environment = dict(environment or os.environ)
        self._grace_s, self._before, self._on_change = grace_s, before, on_change
        self._other = threading.Event()  # something else is wanted now
        self._changed = threading.Condition()
        self._wanted: Command | None = None
        self._closing = False
        self._state = ChildState()
        self._beat = 0.0
        self._ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._ear.settimeout(TURN_S)
        # Held open, and nowhere by name: a kill leaves nothing behind, and who cleans the folder
        # of temporary files takes nothing away.
        with tempfile.TemporaryDirectory(prefix="edgecascade-child-") as folder:
            self._log = open(f"{folder}/log", "a+b", buffering=0)  # noqa: SIM115
            at = os.open(folder, os.O_PATH)
            self._ear.bind(f"/proc/self/fd/{at}/notify")  # a path may be too long for a socket
            self._address = os.open("notify", os.O_PATH, dir_fd=at)
            os.close(at)
        # This thread starts the program, and the kernel ends it with this thread.
        self._thread = threading.Thread(target=self._run, name="child", daemon=True)
        self._thread.start()

    @property
    def state(self) -> ChildState:
        """How it is now."""
        with self._changed:
            return self._state

    def want(self, command: Command | None) -> None:
        """Run this, and nothing else, from now on. What runs already is left alone."""
        with self._changed:
            if command != self._wanted:
                self._wanted = command
                self._other.set()
                self._state = replace(self._state, crashes=0, last_words="")
                self._changed.notify_all()

    def end(self, timeout_s: float) -> bool:
        """Make it end and wait for that; whether it did in time."""
        self.want(None)
        with self._changed:
            return self._changed.wait_for(lambda: self._state.pid is None, timeout_s)

    def wait(self, test: Callable[[ChildState], bool], timeout_s: float) -> bool:
        """Until its state is so, at most for a time; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: test(self._state), timeout_s)

    def close(self) -> None:
        """End it and the thread."""
        with self._changed:
            self._wanted, self._closing = None, True
            self._other.set()
            self._changed.notify_all()
        self._thread.join()
        self._ear.close()
        self._log.close()
        os.close(self._address)

    # From here on everything runs on the child's thread.

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._wanted is not None)
                command = self._wanted
                self._other.clear()
            if command is None:
                return
            try:
                self._before(command, self._other)
                words = self._serve(command) if self._wanted == command else ""
            except Exception as error:  # a thread that is gone would be a device without a service
                log.exception("the service is not kept running")
                words = f"cannot be kept running: {error!r}"
            if words:
                self._crashed(command, words)

    def _serve(self, command: Command) -> str:
        """One run of the program: how it ended, or nothing if something else is wanted."""
        process = self._start(command)
        try:
            self._set(command=command, pid=process.pid, started_at=time.monotonic(),
                      loaded_at=None, ready_at=None)  # fmt: skip
            while self._wanted == command and process.poll() is None:
                self._listen()
                if os.fstat(self._log.fileno()).st_size > MAX_LOG_BYTES:
                    self._log.truncate(0)
                if self._hangs():
                    process.kill()
            ended = process.poll() is not None and self._wanted == command
            return f"ended with status {process.returncode}: {self._tail()}" if ended else ""
        finally:  # whatever went wrong, the next one has the same name
            self._stop(process)
            self._gone()

    def _start(self, command: Command) -> subprocess.Popen[bytes]:
        environment = {
            **self._environment,
            "NOTIFY_SOCKET": f"/proc/self/fd/{self._address}",  # of the program: it inherits it
            "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6)),
        }
        self._drop_old_words()
        self._log.truncate(0)
        process = subprocess.Popen(
            leashed(command),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environment,
            pass_fds=(self._address,),
            start_new_session=True,  # Ctrl-C is for us; it is told to drain
        )
        log.info("started %s as %d", " ".join(command), process.pid)
        return process

    def _listen(self) -> None:
        try:
            words = self._ear.recv(4096)
        except (TimeoutError, OSError):
            return
        now = self._beat = time.monotonic()
        if b"STATUS=loaded" in words and self._state.loaded_at is None:
            self._set(loaded_at=now)
        elif b"READY=1" in words and self._state.ready_at is None:
            self._set(ready_at=now)

    def _hangs(self) -> bool:
        loaded = self._state.loaded_at is not None
        return loaded and time.monotonic() - self._beat > WATCHDOG_S

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        """The way systemd does it: ask, wait, kill."""
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(self._grace_s)
        except subprocess.TimeoutExpired:
            log.error("the service does not end within %g s", self._grace_s)
            process.kill()
            process.wait()

    def _gone(self) -> None:
        def gone(state: ChildState) -> ChildState:
            now = time.monotonic()
            crashes = 0 if now - state.started_at > STEADY_S else state.crashes
            return replace(state, command=None, pid=None, loaded_at=None, ready_at=None,
                           ended_at=now, crashes=crashes)  # fmt: skip

        self._change(gone)

    def _crashed(self, command: Command, words: str) -> None:
        """Count it, and pause before the next start, unless something else is wanted by now."""
        log.error("the service %s", words)

        def crashed(state: ChildState) -> ChildState:
            if self._wanted != command:
                return state
            return replace(state, crashes=state.crashes + 1, last_words=words)

        pause_s = backoff_s(self._change(crashed).crashes, FIRST_PAUSE_S, LONGEST_PAUSE_S)
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._wanted != command, pause_s)

    def _set(self, **changes: object) -> None:
        self._change(lambda state: replace(state, **changes))  # type: ignore[arg-type]

    def _change(self, change: Callable[[ChildState], ChildState]) -> ChildState:
        with self._changed:
            changed = self._state = change(self._state)
            self._changed.notify_all()
        self._on_change()
        return changed

    def _drop_old_words(self) -> None:
        self._ear.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._ear.recv(4096)
        self._ear.settimeout(TURN_S)

    def _tail(self) -> str:
        try:
            fd = self._log.fileno()
            start = max(0, os.fstat(fd).st_size - TAIL_BYTES)
            return os.pread(fd, TAIL_BYTES, start).decode(errors="replace").strip()
        except OSError:
            return ""
