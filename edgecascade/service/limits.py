# SPDX-License-Identifier: Apache-2.0
"""Rates per client, as token buckets. Time is passed in."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

MINUTE_S = 60.0
MAX_CLIENTS = 10_000  # remembered; the longest idle is forgotten, with a full bucket


@dataclass
class _Bucket:
    level: float
    at: float


class Rate:
    """So much per client and minute. A cost known only afterwards makes debts: `charge`."""

    def __init__(self, per_minute: float) -> None:
        self._per_minute = per_minute
        self._most = max(1.0, per_minute)  # less than one would never do for a request
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def wait_s(self, client: str, now: float, cost: float = 0.0) -> float:
        """Seconds until the client may go on; 0 if it may."""
        if not self._per_minute:
            return 0.0
        missing = cost - self._bucket(client, now).level
        return max(0.0, missing / self._per_minute * MINUTE_S)

    def charge(self, client: str, now: float, cost: float) -> None:
        """The client has used this much."""
        if self._per_minute:
            self._bucket(client, now).level -= cost

    def _bucket(self, client: str, now: float) -> _Bucket:
        bucket = self._buckets.get(client)
        if bucket is None:
            bucket = self._buckets[client] = _Bucket(self._most, now)
            if len(self._buckets) > MAX_CLIENTS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end(client)
        gained = max(0.0, now - bucket.at) * self._per_minute / MINUTE_S
        bucket.level = min(self._most, bucket.level + gained)
        bucket.at = max(bucket.at, now)  # a message may be read after what came later was done
        return bucket
