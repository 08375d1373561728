# SPDX-License-Identifier: Apache-2.0
"""The agent's child: one at a time, started again, ended in time, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from edgecascade.fleet import child
from edgecascade.fleet.child import Child, ChildState

WAIT_S = 60.0
# What `serve` says to systemd, and what it does at SIGTERM, without a bundle.
PROGRAM = """
import fcntl, os, signal, socket, sys, time
place, behaviour = sys.argv[1:3]
lock = open(place + "/lock", "a")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where two run at once
open(place + "/runs", "a").write(behaviour + "\\n")
def say(words):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.sendto(words, os.environ["NOTIFY_SOCKET"])
def end(*_):
    if behaviour != "stubborn":
        open(place + "/ends", "a").write("drained\\n")
        os._exit(0)
signal.signal(signal.SIGTERM, end)
if behaviour == "crash":
    print("no such bundle", file=sys.stderr)
    sys.exit(3)
say(b"STATUS=loaded")
while behaviour == "asked" and not os.path.exists(place + "/go"):
    time.sleep(0.01)
if behaviour != "deaf":
    say(b"READY=1")
while True:
    if behaviour != "hang":
        say(b"WATCHDOG=1")
    time.sleep(0.05)
"""

Make = Callable[..., Child]


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:

        def made(**options: object) -> Child:
            one = Child(**{"grace_s": 30.0, **options})  # type: ignore[arg-type]
            stack.callback(one.close)
            return one

        yield made


def program(place: Path, behaviour: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", PROGRAM, str(place), behaviour)


def ready(state: ChildState) -> bool:
    return state.ready_at is not None


def test_it_tells_when_it_is_loaded_and_when_it_is_ready(make: Make, tmp_path: Path) -> None:
    one = make()
    one.want(program(tmp_path, "deaf"))
    assert one.wait(lambda state: state.loaded_at is not None, WAIT_S)
    assert one.state.ready_at is None
    one.want(program(tmp_path, "well"))
    assert one.wait(ready, WAIT_S)


def test_it_drains_before_it_ends(make: Make, tmp_path: Path) -> None:
    one = make()
    one.want(program(tmp_path, "well"))
    assert one.wait(ready, WAIT_S)
    assert one.end(WAIT_S)
    assert (tmp_path / "ends").read_text() == "drained\n"
    assert one.state.pid is None
    assert one.state.crashes == 0


def test_the_old_one_has_ended_before_the_next_starts(make: Make, tmp_path: Path) -> None:
    one = make()
    for behaviour in ("well", "deaf", "well"):
        command = program(tmp_path, behaviour)
        one.want(command)
        assert one.wait(
            lambda s, command=command: s.command == command and s.loaded_at is not None,  # type: ignore[misc]
            WAIT_S,
        )
    assert (tmp_path / "runs").read_text() == "well\ndeaf\nwell\n"
    assert one.state.crashes == 0


def test_what_is_wanted_already_is_left_alone(make: Make, tmp_path: Path) -> None:
    one = make()
    one.want(program(tmp_path, "well"))
    assert one.wait(ready, WAIT_S)
    before = one.state
    one.want(program(tmp_path, "well"))
    assert one.state == before


def test_a_crash_is_counted_explained_and_tried_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "FIRST_PAUSE_S", 0.01)
    one = make()
    one.want(program(tmp_path, "crash"))
    assert one.wait(lambda state: state.crashes >= 3, WAIT_S)
    assert "status 3" in one.state.last_words
    assert "no such bundle" in one.state.last_words
    one.want(program(tmp_path, "well"))
    assert one.wait(ready, WAIT_S)
    assert one.state.crashes == 0


def test_a_crash_is_not_counted_for_what_was_wanted_meanwhile(make: Make, tmp_path: Path) -> None:
    others = [program(tmp_path, "well")]

    def on_change() -> None:
        if one.state.ended_at and others:
            one.want(others.pop())

    one = make(on_change=on_change)
    one.want(program(tmp_path, "crash"))
    assert one.wait(ready, WAIT_S)
    assert (one.state.crashes, one.state.last_words) == (0, "")


class Interrupted(threading.Condition):
    """A lock that something comes before."""

    work: Callable[[], None] | None = None

    def __enter__(self) -> bool:
        work, self.work = self.work, None
        if work is not None:
            work()
        return super().__enter__()


def test_who_wants_another_while_one_ends_has_its_crashes_counted_anew(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(threading, "Condition", Interrupted)
        one = make(before=lambda command, stopped: stopped.wait())
    one._state = ChildState(crashes=1, started_at=time.monotonic())
    one._changed.work = lambda: one.want(program(tmp_path, "well"))  # type: ignore[attr-defined]
    one._gone()
    assert one.state.crashes == 0


def test_what_cannot_be_started_is_a_crash(make: Make) -> None:
    one = make()
    one.want(("/nowhere/python", "-c", "pass"))
    assert one.wait(lambda state: state.crashes >= 1, WAIT_S)


def test_who_cleans_the_folder_of_temporary_files_ends_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    one = make()
    one.want(program(tmp_path, "asked"))
    assert one.wait(lambda state: state.loaded_at is not None, WAIT_S)
    assert not list(temporary.iterdir()), "what lies there can be taken away"
    temporary.rmdir()
    (tmp_path / "go").touch()
    assert one.wait(ready, WAIT_S)
    assert one.end(WAIT_S)
    assert (tmp_path / "runs").read_text() == "asked\n"
    assert (tmp_path / "ends").read_text() == "drained\n"


def test_it_is_ended_before_the_next_starts_whatever_goes_wrong(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "FIRST_PAUSE_S", 0.01)
    one = make()
    troubles = ["no more descriptors"]

    def hangs() -> bool:
        if one.state.ready_at is not None and troubles:
            raise RuntimeError(troubles.pop())
        return False

    monkeypatch.setattr(one, "_hangs", hangs)
    one.want(program(tmp_path, "well"))
    assert one.wait(lambda state: state.crashes == 1 and ready(state), WAIT_S)
    assert "no more descriptors" in one.state.last_words
    assert one.end(WAIT_S)
    assert (tmp_path / "ends").read_text() == "drained\ndrained\n"


def test_what_fails_before_a_start_is_tried_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "FIRST_PAUSE_S", 0.01)
    troubles = [subprocess.TimeoutExpired("engine", 10), OSError("no memory")]

    def before(command: child.Command, stopped: threading.Event) -> None:
        if troubles:
            raise troubles.pop()

    one = make(before=before)
    one.want(program(tmp_path, "well"))
    assert one.wait(lambda state: state.crashes == 2 and ready(state), WAIT_S)


def test_what_fails_before_a_start_is_counted_also_after_a_steady_run(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(child, "STEADY_S", 0.0)
    ends = threading.Event()

    def before(command: child.Command, stopped: threading.Event) -> None:
        if ends.is_set():
            raise OSError("no memory")

    one = make(before=before)
    one.want(program(tmp_path, "well"))
    assert one.wait(ready, WAIT_S)
    ends.set()
    assert one.state.pid is not None
    os.kill(one.state.pid, signal.SIGKILL)
    assert one.wait(lambda state: state.crashes >= 3, WAIT_S)


def test_one_that_hangs_is_killed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "WATCHDOG_S", 0.3)
    monkeypatch.setattr(child, "FIRST_PAUSE_S", 0.01)
    one = make()
    one.want(program(tmp_path, "hang"))
    assert one.wait(lambda state: state.crashes >= 1, WAIT_S)
    assert "status -9" in one.state.last_words


def test_one_that_will_not_end_is_killed_after_its_grace(make: Make, tmp_path: Path) -> None:
    one = make(grace_s=0.2)
    one.want(program(tmp_path, "stubborn"))
    assert one.wait(ready, WAIT_S)
    assert one.end(WAIT_S)
    assert not (tmp_path / "ends").exists()


def test_what_has_to_be_prepared_is_prepared_before_each_start(make: Make, tmp_path: Path) -> None:
    prepared: list[str] = []
    one = make(before=lambda command, stopped: prepared.append(command[-1]))
    one.want(program(tmp_path, "well"))
    assert one.wait(ready, WAIT_S)
    assert prepared == ["well"]


def test_it_dies_with_us_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """SIGKILL of the parent, which can do nothing about it."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    parent = f"""
import sys, time
from edgecascade.fleet.child import Child
one = Child()
one.want({program(tmp_path, "well")!r})
assert one.wait(lambda s: s.ready_at is not None, {WAIT_S})
print(one.state.pid, flush=True)
time.sleep(1000)
"""
    with subprocess.Popen(
        [sys.executable, "-c", parent],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(temporary)},
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        watched = os.pidfd_open(pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
    import select

    with open(watched, "rb", closefd=True) as file:
        assert select.select([file], [], [], WAIT_S)[0], "the child lives on"
    assert not list(temporary.iterdir())
    assert not (tmp_path / "ends").exists()
