# SPDX-License-Identifier: Apache-2.0
"""What Ctrl-C and SIGTERM mean to a program that serves."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def stopped_by(numbers: Iterable[int], stop: Callable[[], None]) -> Iterator[None]:
    """While this runs, these signals call `stop`; the second time they interrupt."""

    def handle(number: int, _: object) -> None:
        signal.signal(number, signal.default_int_handler)
        stop()

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
