# SPDX-License-Identifier: Apache-2.0
"""What executes a bundle: `open_backend` picks one and says why."""

from edgecascade.backends.base import BACKENDS, Backend, Snapshot, open_backend

__all__ = ["BACKENDS", "Backend", "Snapshot", "open_backend"]
