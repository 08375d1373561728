# SPDX-License-Identifier: Apache-2.0
"""hawkBit as the carrier: a small artifact brings the order, feedback takes the reports.

    ddi = Ddi("https://hawkbit.example/DEFAULT/controller/v1/robot-7")
    poll = read_poll(GET ddi.url)
    deployment = read_deployment(GET poll.deployment)      # its artifact edgecascade-order.json
    envelope = deployment.checked(GET deployment.url)      # to the agent's command topic
    POST ddi.feedback_url(deployment.id), feedback(report) # of a report that the agent published

The software module in hawkBit has one artifact: the file repository/orders/GROUP.json under the
name edgecascade-order.json. Shapes are those of hawkBit's Direct Device Integration API. The signed
report goes along in pieces, as last details; `signed_report` joins them for who verifies.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urljoin, urlsplit

from edgecascade.errors import InvalidRequest, UpdateRefused
from edgecascade.fleet import reports
from edgecascade.fleet.jobs import Job
from edgecascade.fleet.orders import MAX_ENVELOPE_BYTES
from edgecascade.service import wire

ARTIFACT = "edgecascade-order.json"
MAX_ANSWER_BYTES = 1 << 20
LEAST_SLEEP_S, LONGEST_SLEEP_S = 5.0, 86_400.0
MAX_DETAIL = 512
PIECE = "report:"
PIECE_CHARS = MAX_DETAIL - len(PIECE)

Finished = Literal["success", "failure", "none"]


@dataclass(frozen=True)
class Poll:
    """An answer to a poll: when to ask again, and what there is to do."""

    sleep_s: float
    deployment: str | None = None
    cancel: str | None = None


@dataclass(frozen=True)
class Deployment:
    """An action with an order in it."""

    id: str
    url: str
    size: int
    sha256: str

    def checked(self, data: bytes) -> bytes:
        """The artifact, if it is the one that was named. Its signature is checked by the agent.

        Raises:
            UpdateRefused: when it is another.
        """
        if len(data) != self.size or hashlib.sha256(data).hexdigest() != self.sha256:
            raise UpdateRefused(
                f"artifact of {len(data)} bytes is not the one of {self.size} bytes that action "
                f"{self.id} names",
                reason="malformed",
            )
        return data


@dataclass(frozen=True)
class Ddi:
    """Addresses below a controller's own: https://HOST/TENANT/controller/v1/CONTROLLER."""

    url: str

    def feedback_url(self, action: str) -> str:
        """Where reports about an action go."""
        return f"{self.url}/deploymentBase/{action}/feedback"

    def cancel_url(self, action: str) -> str:
        """Where the answer to a cancel goes."""
        return f"{self.url}/cancelAction/{action}/feedback"

    def owns(self, url: str) -> bool:
        """Whether an address that the server named is the server's own."""
        return urlsplit(urljoin(self.url, url))[:2] == urlsplit(self.url)[:2]


def read_poll(data: bytes) -> Poll:
    """What a poll answered.

    Raises:
        UpdateRefused: for anything that hawkBit does not send.
    """
    body = _object(data)
    sleep = _at(body, "config", "polling", "sleep")
    match = re.fullmatch(r"(\d\d):(\d\d):(\d\d)", str(sleep))
    if match is None:
        raise UpdateRefused(f"sleep is {sleep!r:.40}; expected HH:MM:SS", reason="malformed")
    hours, minutes, seconds = (int(part) for part in match.groups())
    asked_s = 3600.0 * hours + 60 * minutes + seconds
    return Poll(
        min(LONGEST_SLEEP_S, max(LEAST_SLEEP_S, asked_s)),
        _text(_at(body, "_links", "deploymentBase", "href")),
        _text(_at(body, "_links", "cancelAction", "href")),
    )


def read_deployment(data: bytes) -> Deployment:
    """The order's artifact in an action.

    Raises:
        UpdateRefused: when there is none, more than one, or it is too large.
    """
    body = _object(data)
    found = [
        artifact
        for chunk in _items(_at(body, "deployment", "chunks"))
        for artifact in _items(_at(chunk, "artifacts"))
        if _at(artifact, "filename") == ARTIFACT
    ]
    if len(found) != 1:
        raise UpdateRefused(
            f"action {_at(body, 'id')!r:.40} has {len(found)} artifacts {ARTIFACT}; give it one",
            reason="no-order",
        )
    artifact = found[0]
    links = _at(artifact, "_links")
    url = _text(_at(links, "download", "href") or _at(links, "download-http", "href"))
    action, size = _text(_at(body, "id")), _at(artifact, "size")
    sha256 = _text(_at(artifact, "hashes", "sha256"))
    if action is None or url is None or sha256 is None:
        raise UpdateRefused("an action without an id, a link or a hash", reason="malformed")
    if type(size) is not int or not 0 < size <= MAX_ENVELOPE_BYTES:
        raise UpdateRefused(
            f"an order of {size!r:.20} bytes; at most {MAX_ENVELOPE_BYTES}", reason="malformed"
        )
    return Deployment(action, url, size, sha256.lower())


def feedback(report: bytes) -> dict[str, Any]:
    """A report as hawkBit takes it.

    Raises:
        InvalidRequest: when the bytes are no report.
    """
    job = reports.unproven(report)
    if job is None:
        raise InvalidRequest(f"{report!r:.80} is no report; give what the agent published")
    finished: Finished = "none"
    if job.ended:
        finished = "success" if job.state == "SUCCEEDED" else "failure"
    execution = "closed" if job.ended else "scheduled" if job.state == "QUEUED" else "proceeding"
    details = _details(job) + _pieces(report)
    return _status(int(job.ts * 1000), execution, finished, details, job.progress)


def signed_report(details: Sequence[str]) -> bytes:
    """The report in an action's details, as the device signed it; empty if there is none.

    Whether it is to be believed, reports.Keyring says.
    """
    return "".join(text.removeprefix(PIECE) for text in details if text.startswith(PIECE)).encode()


def read_cancel(data: bytes) -> str:
    """The action that the server wants to cancel.

    Raises:
        UpdateRefused: for anything else.
    """
    stop = _text(_at(_object(data), "cancelAction", "stopId"))
    if stop is None:
        raise UpdateRefused("a cancel without a stopId", reason="malformed")
    return stop


def cancel_feedback(ts: float) -> dict[str, Any]:
    """A cancel is not signed, so it is not obeyed; say how to stop it."""
    text = "not signed: roll out the order with action abort instead (edgecascade fleet abort)"
    return _status(int(ts * 1000), "rejected", "none", [text], None)


def _status(
    timestamp_ms: int, execution: str, finished: Finished, details: list[str], share: float | None
) -> dict[str, Any]:
    result: dict[str, Any] = {"finished": finished}
    if share is not None:
        result["progress"] = {"cnt": round(100 * share), "of": 100}
    return {
        "timestamp": timestamp_ms,
        "status": {"execution": execution, "result": result, "details": details},
    }


def _details(job: Job) -> list[str]:
    texts = [f"order {job.order}", f"{job.state} {job.phase}".strip()]
    texts += [f"{name}: {value}" for name, value in sorted(job.evidence.items())]
    return [text[:MAX_DETAIL] for text in texts]


def _pieces(report: bytes) -> list[str]:
    text = report.decode()
    return [PIECE + text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS)]


def _object(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_ANSWER_BYTES:
        raise UpdateRefused(f"an answer of {len(data)} bytes", reason="malformed")
    try:
        body = wire.decode(data)
        if not isinstance(body, dict):
            raise wire.BadJson("it is no object")
    except wire.BadJson as error:
        raise UpdateRefused(f"an answer that is {error}", reason="malformed") from None
    return body


def _at(value: Any, *keys: str) -> Any:
    """What lies below these keys; None where the shape is another."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
