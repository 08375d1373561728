# SPDX-License-Identifier: Apache-2.0
"""What a device signs: that this is its key (once), how it stands, by itself and with an order.

Whoever owns the broker could say of every device that it succeeded, and the rollout would go on. So
a word counts only under the key that was enrolled for the device it speaks of, by hand and not over
the broker. An envelope is a DSSE one, as an order's is. Nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from edgecascade.errors import FleetError, ReportRefused
from edgecascade.fleet import envelopes, strict
from edgecascade.fleet.jobs import Job, read_job
from edgecascade.fleet.keys import public_key
from edgecascade.fleet.orders import ID, SHA256
from edgecascade.fleet.standing import Standing
from edgecascade.service import wire

if TYPE_CHECKING:
    from securesystemslib.signer import Signer, SSlibKey

SCHEMA = 1
REPORT_TYPE = "application/vnd.edgecascade.report+json"
STANDING_TYPE = "application/vnd.edgecascade.standing+json"
ENROLMENT_TYPE = "application/vnd.edgecascade.enrolment+json"
MAX_REPORT_BYTES = 5 << 10
MAX_ENROLMENT_BYTES = 64 << 10


@dataclass(frozen=True)
class DeviceKey:
    """A device, the groups whose orders it obeys, and the key that its reports are signed with.

    `agent` is its agent's name at the broker, under which its status comes.
    """

    device: str
    agent: str
    public: str  # ed25519, 64 hex digits
    groups: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in (self.device, self.agent, *self.groups):
            if not ID.fullmatch(name):
                raise ValueError(f"{name!r:.80} is no name; expected {ID.pattern}")
        if not SHA256.fullmatch(self.public):
            raise ValueError(f"public is {self.public!r:.80}; expected 64 hex digits")


def sign(word: Job | Standing, signer: Signer) -> bytes:
    """A report, or how a device stands, as published.

    Raises:
        FleetError: when the extra `fleet` is not installed.
    """
    kind = REPORT_TYPE if isinstance(word, Job) else STANDING_TYPE
    return envelopes.seal(word.to_bytes(), kind, [signer])


def unproven(report: bytes) -> Job | None:
    """What a report says, whoever signed it; None for what is not one."""
    try:
        return read_job(envelopes.unproven(report)) if len(report) <= MAX_REPORT_BYTES else None
    except ValueError:
        return None


class Keyring:
    """Whose reports are believed. Those of revoked keys are told from those of unknown ones."""

    def __init__(self, keys: Iterable[DeviceKey], revoked: Iterable[DeviceKey] = ()) -> None:
        self._known: dict[str, tuple[SSlibKey, DeviceKey, bool]] = {}
        for good, some in ((False, revoked), (True, keys)):
            for key in some:
                public = public_key(key.public)
                self._known[public.keyid] = public, key, good

    def verify(self, report: bytes) -> Job:
        """The report in an envelope, when the device that it speaks of signed it.

        Raises:
            ReportRefused: with a `reason`: malformed, unknown-key, revoked, signature,
                another-device.
        """
        key, body = self._opened(report, REPORT_TYPE)
        job = read_job(body)
        if job is None:
            raise ReportRefused(f"{key.device} signed what is no report", reason="malformed")
        _check_own(key, job.device)
        return job

    def standing(self, word: bytes) -> Standing:
        """How a device stands, when it says so itself.

        Raises:
            ReportRefused: see verify.
        """
        key, body = self._opened(word, STANDING_TYPE)
        try:
            standing = Standing.parse(body)
        except strict.BadDocument as error:
            raise ReportRefused(
                f"{key.device} signed nonsense: {error}", reason="malformed"
            ) from None
        _check_own(key, standing.device)
        return standing

    def _opened(self, word: bytes, kind: str) -> tuple[DeviceKey, bytes]:
        """Whose word of a kind this is, and what it says."""
        try:
            sealed = envelopes.read(word, kind, MAX_REPORT_BYTES)
        except envelopes.BadEnvelope as error:
            raise ReportRefused(f"no device says so: {error}", reason="malformed") from None
        signers = [self._known[keyid] for keyid in sealed.keyids if keyid in self._known]
        if len(signers) != 1:
            raise ReportRefused(
                f"it is signed with {len(signers)} keys that are enrolled, 1 is needed",
                reason="unknown-key",
            )
        public, key, good = signers[0]
        if not good:
            raise ReportRefused(f"the key of {key.device} is revoked", reason="revoked")
        if not sealed.is_signed_by(public):
            raise ReportRefused(f"this is not {key.device}'s signature", reason="signature")
        return key, sealed.body


def _check_own(key: DeviceKey, device: str) -> None:
    """A device speaks for itself only."""
    if device != key.device:
        raise ReportRefused(f"{key.device} reports about {device!r:.80}", reason="another-device")


def sign_enrolment(key: DeviceKey, signer: Signer) -> bytes:
    """What a device hands its operator: its name and public key, and proof that it has the other.

    Raises:
        FleetError: when the extra `fleet` is not installed.
    """
    body = wire.encode({"schema": SCHEMA, **asdict(key)})
    return envelopes.seal(body, ENROLMENT_TYPE, [signer])


def read_enrolment(data: bytes) -> DeviceKey:
    """The device in an enrolment.

    Raises:
        FleetError: for anything else, and for one that its own key did not sign.
    """
    try:
        sealed = envelopes.read(data, ENROLMENT_TYPE, MAX_ENROLMENT_BYTES)
        key = strict.parse(
            DeviceKey, sealed.body, "enrolment", schema=SCHEMA, limit=MAX_ENROLMENT_BYTES
        )
        signed = sealed.is_signed_by(public_key(key.public))
    except (envelopes.BadEnvelope, strict.BadDocument) as error:
        raise FleetError(
            f"this is no enrolment: {error}; make one on the device: edgecascade agent enroll",
            reason="enrolment",
        ) from None
    if not signed:
        raise FleetError(
            f"the enrolment of {key.device} is not signed with the key that it names: it was "
            "changed on the way; copy it again",
            reason="enrolment",
        )
    return key
