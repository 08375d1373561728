# SPDX-License-Identifier: Apache-2.0
"""AWS IoT Jobs as the carrier: job documents become orders, reports become job executions.

    jobs = AwsJobs("robot-7")                  on the device; AWS knows it as thing robot-7
    subscribe to jobs.filters; publish jobs.start()
    jobs.hear(topic, payload)                  -> messages to AWS, and orders for the agent
    jobs.report(payload)                       -> messages to AWS, of a report the agent published

A job's document is {"operation": "edgecascade-order", "envelope": {...}}: `document` makes it from
the file repository/orders/GROUP.json. Topics and fields are those of the AWS IoT developer guide,
"Jobs device MQTT API"; a device may set IN_PROGRESS, SUCCEEDED, FAILED and REJECTED. The signed
report goes along in pieces, report-0, report-1 ...; `signed_report` joins them for who verifies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgecascade.errors import InvalidRequest
from edgecascade.fleet import reports
from edgecascade.fleet.jobs import Job, JobState
from edgecascade.fleet.orders import ID
from edgecascade.service import wire

OPERATION = "edgecascade-order"
MAX_DOCUMENT_BYTES = 32 << 10
MAX_DETAIL = 1024  # characters of a value in statusDetails
PIECE = "report-"
STATUS: dict[JobState, str] = {
    "QUEUED": "IN_PROGRESS",  # a job that was started does not go back into the queue
    "IN_PROGRESS": "IN_PROGRESS",
    "SUCCEEDED": "SUCCEEDED",
    "FAILED": "FAILED",
    "REJECTED": "REJECTED",
    "CANCELED": "FAILED",  # only AWS itself can cancel
}


@dataclass(frozen=True)
class ToAws:
    """A message to publish at AWS, with QoS 1."""

    topic: str
    payload: bytes


@dataclass(frozen=True)
class ToAgent:
    """A signed order, to be published on the agent's command topic."""

    envelope: bytes


@dataclass(frozen=True)
class Said:
    """A report as the agent published it, and what it says."""

    job: Job
    report: bytes


@dataclass(frozen=True)
class Execution:
    """The job that the device works on. `waiting` is a report that AWS has not taken yet."""

    job_id: str
    number: int
    version: int
    order: str = ""  # the order's own name, known from the first report
    sent: Said | None = None
    waiting: Said | None = None


Out = ToAws | ToAgent


def document(envelope: bytes) -> dict[str, Any]:
    """The job document for a signed order.

    Raises:
        InvalidRequest: when it is larger than AWS takes.
    """
    made = {"operation": OPERATION, "envelope": wire.decode(envelope)}
    size = len(wire.encode(made))
    if size > MAX_DOCUMENT_BYTES:
        raise InvalidRequest(f"a job document of {size} bytes; AWS takes {MAX_DOCUMENT_BYTES}")
    return made


class AwsJobs:
    """The device's side of one thing's jobs."""

    def __init__(self, thing: str) -> None:
        self._jobs = f"$aws/things/{thing}/jobs"
        self.execution: Execution | None = None

    @property
    def filters(self) -> tuple[str, ...]:
        """What to subscribe to."""
        return (
            f"{self._jobs}/notify-next",
            f"{self._jobs}/start-next/accepted",
            f"{self._jobs}/start-next/rejected",
            f"{self._jobs}/+/update/accepted",
            f"{self._jobs}/+/update/rejected",
        )

    def start(self) -> list[Out]:
        """Ask for the next job: once connected, and whenever it has changed."""
        return [ToAws(f"{self._jobs}/start-next", wire.encode({"clientToken": "start"}))]

    def hear(self, topic: str, payload: bytes) -> list[Out]:
        """What to do about a message of AWS; nothing for one that is not understood."""
        levels = topic.removeprefix(f"{self._jobs}/").split("/")
        try:
            body = wire.decode(payload)
            wire.fingerprint(body)  # what has no UTF-8 could not be passed on
        except wire.BadJson:
            return []
        if not isinstance(body, dict):
            return []
        match levels:
            case ["notify-next"]:
                return self._notified(body)
            case ["start-next", "accepted"]:
                return self._started(body.get("execution"))
            case [job_id, "update", "accepted" | "rejected" as answer]:
                return self._answered(job_id, body, accepted=answer == "accepted")
        return []

    def report(self, payload: bytes) -> list[Out]:
        """Pass a report on; while AWS has not answered, only the latest is kept."""
        current, job = self.execution, reports.unproven(payload)
        if current is None or job is None or (current.order and current.order != job.order):
            return []
        self.execution = replace(current, order=job.order, waiting=Said(job, payload))
        return self._send() if current.sent is None else []

    def _notified(self, body: Mapping[str, Any]) -> list[Out]:
        execution = body.get("execution")
        if not isinstance(execution, dict):
            return []
        same = self.execution is not None and execution.get("jobId") == self.execution.job_id
        return [] if same else self.start()

    def _started(self, execution: Any) -> list[Out]:
        if not isinstance(execution, dict) or not isinstance(execution.get("jobDocument"), dict):
            return []
        number, version = execution.get("executionNumber"), execution.get("versionNumber")
        job_id, made = execution.get("jobId"), execution["jobDocument"]
        if not isinstance(job_id, str) or not ID.fullmatch(job_id):
            return []  # it becomes a level of a topic
        if not (type(number) is int and type(version) is int):
            return []
        self.execution = Execution(job_id, number, version)
        envelope = made.get("envelope")
        if made.get("operation") != OPERATION or not isinstance(envelope, dict):
            self.execution = None  # another program's job, which is left to it
            return []
        return [ToAgent(wire.encode(envelope))]

    def _answered(self, job_id: str, body: Mapping[str, Any], *, accepted: bool) -> list[Out]:
        current = self.execution
        if current is None or current.job_id != job_id or current.sent is None:
            return []
        sent, state = current.sent, body.get("executionState")
        known = state.get("versionNumber") if isinstance(state, dict) else None
        version = known if type(known) is int else current.version + accepted
        waiting = current.waiting
        if not accepted and body.get("code") == "VersionMismatch":
            waiting = waiting or sent
        self.execution = replace(current, version=version, sent=None, waiting=waiting)
        if sent.job.ended and waiting is None:
            self.execution = None
            return self.start()
        return self._send() if waiting is not None else []

    def _send(self) -> list[Out]:
        current = self.execution
        assert current is not None
        said = current.waiting
        assert said is not None
        self.execution = replace(current, sent=said, waiting=None)
        job = said.job
        body = {
            "status": STATUS[job.state],
            "statusDetails": details(said),
            "expectedVersion": current.version,
            "executionNumber": current.number,
            "includeJobExecutionState": True,
            "clientToken": f"{job.seq}-{job.version}",
        }
        return [ToAws(f"{self._jobs}/{current.job_id}/update", wire.encode(body))]


def details(said: Said) -> dict[str, str]:
    """A report as AWS's names and texts, ten at most: what a person reads, then the pieces."""
    job, report = said.job, said.report.decode()
    known = {
        "state": job.state,
        "phase": job.phase,
        "progress": f"{job.progress:.2f}",
        "reason": str(job.evidence.get("reason", "")),
        "message": str(job.evidence.get("message", "")),
    }
    shown = {name: text[:MAX_DETAIL] for name, text in known.items() if text}
    starts = range(0, len(report), MAX_DETAIL)
    pieces = {f"{PIECE}{n}": report[at : at + MAX_DETAIL] for n, at in enumerate(starts)}
    return {**shown, **pieces}


def signed_report(status_details: Mapping[str, Any]) -> bytes:
    """The report in an execution's statusDetails, as the device signed it; empty if there is none.

    Whether it is to be believed, reports.Keyring says.
    """
    names = (f"{PIECE}{n}" for n in range(len(status_details)))
    return "".join(str(status_details[name]) for name in names if name in status_details).encode()
