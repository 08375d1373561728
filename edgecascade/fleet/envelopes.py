# SPDX-License-Identifier: Apache-2.0
"""Signed documents: DSSE envelopes with ed25519 signatures. Bytes in, bytes out.

What is signed says what it is (`kind`), so that a signature on a report is never one on an order.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgecascade.fleet.needs import fleet_extra
from edgecascade.service import wire

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import Signer, SSlibKey


class BadEnvelope(ValueError):
    """The bytes are no envelope of this kind; the message says why."""


class Sealed:
    """An envelope that was read: nothing in it is proven before `is_signed_by` says so."""

    def __init__(self, envelope: Envelope) -> None:
        self.body: bytes = envelope.payload
        self._pae = envelope.pae()
        self._signatures = envelope.signatures

    @property
    def keyids(self) -> tuple[str, ...]:
        """The keys that are said to have signed."""
        return tuple(self._signatures)

    def is_signed_by(self, key: SSlibKey) -> bool:
        """Whether the body carries this key's signature."""
        with fleet_extra():
            from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
        signature = self._signatures.get(key.keyid)
        if signature is None:
            return False
        try:
            key.verify_signature(signature, self._pae)
        except (UnverifiedSignatureError, VerificationError):
            return False
        return True


def seal(body: bytes, kind: str, signers: Sequence[Signer]) -> bytes:
    """The envelope, the same bytes for the same body and keys.

    Raises:
        FleetError: when the extra `fleet` is not installed.
    """
    with fleet_extra():
        from securesystemslib.dsse import Envelope
    envelope = Envelope(body, kind, {})
    for signer in signers:
        envelope.sign(signer)
    return wire.encode(envelope.to_dict())


def read(data: bytes, kind: str, limit: int) -> Sealed:
    """The envelope in the bytes, at most `limit` of them.

    Raises:
        BadEnvelope: for anything else.
    """
    if len(data) > limit:
        raise BadEnvelope(f"it has {len(data)} bytes; at most {limit} are read")
    with fleet_extra():
        from securesystemslib.dsse import Envelope
    try:
        envelope = Envelope.from_dict(wire.decode(data))
        found = envelope.payload_type
        sealed = Sealed(envelope)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadEnvelope(f"it is no envelope: {error}") from None
    if found != kind:
        raise BadEnvelope(f"it is an envelope of {found!r:.80}, expected {kind}")
    return sealed


def unproven(data: bytes) -> bytes:
    """The body of an envelope, whoever signed it.

    Raises:
        ValueError: when there is none.
    """
    try:
        return b64decode(wire.decode(data)["payload"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"no envelope: {error}") from None
