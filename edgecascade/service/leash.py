# SPDX-License-Identifier: Apache-2.0
"""Programs that end with the one that started them, whatever way that ends.

The kernel means the thread that started a program when it says parent: start it from one that stays
for as long as the program should.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

# Asks the kernel to kill this process with its parent, then becomes the program. A parent that is
# gone before the request is seen by its changed id.
_LEASH = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != int(sys.argv[1]):
        os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def leashed(command: Sequence[str]) -> list[str]:
    """The command that starts this one so; its first word is an absolute path."""
    return [sys.executable, "-c", _LEASH, str(os.getpid()), *command]
