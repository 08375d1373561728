# SPDX-License-Identifier: Apache-2.0
"""Who holds which of a backend's slots."""

from __future__ import annotations

import threading

from edgecascade.errors import BackendError, InvalidRequest


class SlotPool:
    """Hands out slots; threads wait for one, one thread cannot wait for itself."""

    def __init__(self, count: int) -> None:
        self._free = list(range(count))
        self._holder: dict[int, int] = {}
        self._changed = threading.Condition()
        self._closed = False

    def take(self, *, wait: bool) -> int | None:
        """A free slot; None if there is none and `wait` is false.

        Raises:
            InvalidRequest: when open streams of this very thread hold all slots.
            BackendError: when the pool is closed.
        """
        with self._changed:
            while not self._free and not self._closed:
                if not wait:
                    return None
                if set(self._holder.values()) == {threading.get_ident()}:
                    raise InvalidRequest(
                        f"open streams of this thread hold all {len(self._holder)} slots; "
                        "finish or close one, or load with more slots"
                    )
                self._changed.wait()
            if self._closed:
                raise BackendError("the LLM is closed; load it again")
            slot = self._free.pop(0)
            self._holder[slot] = threading.get_ident()
            return slot

    def give(self, slot: int) -> None:
        """Return a slot."""
        with self._changed:
            del self._holder[slot]
            self._free.append(slot)
            self._changed.notify()

    def close(self) -> None:
        """Wake all who wait; nobody gets a slot any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
