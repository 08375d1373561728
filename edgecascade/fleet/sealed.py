# SPDX-License-Identifier: Apache-2.0
"""Small files that say whether they are whole, and what they are: a checksum before the content."""

from __future__ import annotations

import hashlib


def seal(kind: str, body: bytes) -> bytes:
    """A file's bytes."""
    return _digest(kind, body) + b"\n" + body


def unseal(kind: str, data: bytes) -> bytes | None:
    """The content; None for a file that was damaged, or is another kind's."""
    digest, _, body = data.partition(b"\n")
    return body if digest == _digest(kind, body) else None


def _digest(kind: str, body: bytes) -> bytes:
    return hashlib.sha256(kind.encode() + b"\n" + body).hexdigest().encode()
