# SPDX-License-Identifier: Apache-2.0
"""A stream's threads begin and end with it, whatever the process or the system does meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from edgecascade.backends._lib import Stream, cpu_library

WAIT_S = 20.0
ASLEEP_S = 0.05  # workers lie down after 200 us without work
THREADS = """
import resource
from pathlib import Path

from edgecascade.backends._lib import cpu_library
from edgecascade.errors import BackendError

library, pages = cpu_library(), int(Path("/proc/self/statm").read_text().split()[0])
room = pages * resource.getpagesize() + (64 << 20)  # for the stacks of a few
resource.setrlimit(resource.RLIMIT_AS, (room, room))
try:
    library.stream(64)
except BackendError as error:
    print(error)
"""


@pytest.mark.parametrize("end", [Stream.close, Stream.__del__], ids=["close", "del"])
def test_a_forked_child_can_end_what_its_parent_uses(end: Callable[[Stream], None]) -> None:
    stream = cpu_library().stream(4)
    time.sleep(ASLEEP_S)
    child = os.fork()
    if child == 0:
        signal.alarm(int(WAIT_S))
        end(stream)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    stream.close()


def test_threads_that_cannot_be_had_are_an_error_not_the_end() -> None:
    asked = subprocess.run(
        [sys.executable, "-c", THREADS],
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert asked.returncode == 0, asked.stderr
    assert "stream_create: Resource temporarily unavailable" in asked.stdout
