# SPDX-License-Identifier: Apache-2.0
"""How long to wait before something that failed is tried again."""

from __future__ import annotations

import math


def backoff_s(failures: int, first_s: float, longest_s: float) -> float:
    """Seconds after so many failures in a row: `first_s` after the first, then doubled each time.

    Any number of failures is fine; a power of two soon is no float any more.
    """
    enough = math.ceil(math.log2(longest_s / first_s)) + 1
    return min(first_s * 2.0 ** (min(failures, enough) - 1), longest_s)
