# SPDX-License-Identifier: Apache-2.0
"""AWS IoT Jobs and hawkBit as carriers, against the shapes that their documentation shows."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner

from edgecascade.errors import InvalidRequest, ReportRefused, UpdateRefused
from edgecascade.fleet import reports
from edgecascade.fleet.adapters import aws_jobs, hawkbit
from edgecascade.fleet.adapters.aws_jobs import AwsJobs, ToAgent, ToAws
from edgecascade.fleet.jobs import STATES, Job
from edgecascade.fleet.keys import public_hex
from edgecascade.fleet.reports import DeviceKey, Keyring
from edgecascade.service import wire

SIGNER = CryptoSigner.generate_ed25519()
KEY = DeviceKey("robot-7", "robot-7-agent", public_hex(SIGNER.public_key), ("site",))


def signed(job: Job) -> bytes:
    return reports.sign(job, SIGNER)


ENVELOPE = wire.encode({"payload": "eyJ9", "payloadType": "order", "signatures": []})
JOB = Job("o-1", 7, "robot-7", "IN_PROGRESS", "downloading", progress=0.25, ts=1_795_440_000.5)
DONE = replace(JOB, state="SUCCEEDED", phase="", progress=1.0)
FAILED = replace(
    JOB, state="FAILED", phase="", evidence={"reason": "wrong-answer", "message": "token 3 is 9"}
)

TOPIC = "$aws/things/robot-7/jobs"


def notified(job_id: str = "job1") -> bytes:
    execution = {
        "jobId": job_id,
        "status": "QUEUED",
        "queuedAt": 1517016947,
        "lastUpdatedAt": 1517016947,
        "versionNumber": 1,
        "executionNumber": 1,
        "jobDocument": {"operation": "test"},
    }
    return wire.encode({"timestamp": 1517016948, "execution": execution})


def started(document: dict[str, Any], job_id: str = "job1", version: int = 2) -> bytes:
    execution = {
        "thingName": "robot-7",
        "jobId": job_id,
        "status": "IN_PROGRESS",
        "statusDetails": {},
        "queuedAt": 1517016947,
        "startedAt": 1517017472,
        "lastUpdatedAt": 1517017472,
        "versionNumber": version,
        "executionNumber": 1,
        "jobDocument": document,
    }
    return wire.encode({"clientToken": "start", "timestamp": 1517017472, "execution": execution})


def accepted(version: int) -> bytes:
    state = {"status": "IN_PROGRESS", "statusDetails": {}, "versionNumber": version}
    return wire.encode({"clientToken": "t", "timestamp": 1517017473, "executionState": state})


def rejected(code: str, version: int) -> bytes:
    state = {"status": "IN_PROGRESS", "statusDetails": {}, "versionNumber": version}
    body = {"code": code, "message": "m", "clientToken": "t", "timestamp": 1517017473}
    return wire.encode({**body, "executionState": state})


def working() -> AwsJobs:
    jobs = AwsJobs("robot-7")
    out = jobs.hear(f"{TOPIC}/start-next/accepted", started(aws_jobs.document(ENVELOPE)))
    assert out == [ToAgent(ENVELOPE)]
    return jobs


def sent(out: list[Any]) -> dict[str, Any]:
    (message,) = out
    assert isinstance(message, ToAws)
    assert message.topic == f"{TOPIC}/job1/update"
    body: dict[str, Any] = json.loads(message.payload)
    return body


def test_a_new_job_is_started_and_its_order_goes_to_the_agent() -> None:
    jobs = AwsJobs("robot-7")
    assert f"{TOPIC}/notify-next" in jobs.filters
    assert len(jobs.filters) <= 8, "AWS takes eight filters in one subscription"
    assert jobs.hear(f"{TOPIC}/notify-next", notified()) == jobs.start()
    assert working().hear(f"{TOPIC}/notify-next", notified()) == [], "it is the one that runs"


def test_a_report_is_an_update_with_the_version_that_aws_expects() -> None:
    jobs = working()
    body = sent(jobs.report(signed(JOB)))
    assert body["status"] == "IN_PROGRESS"
    assert body["expectedVersion"] == 2
    assert body["executionNumber"] == 1
    shown = {k: v for k, v in body["statusDetails"].items() if not k.startswith("report-")}
    assert shown == {"state": "IN_PROGRESS", "phase": "downloading", "progress": "0.25"}
    assert jobs.hear(f"{TOPIC}/job1/update/accepted", accepted(3)) == []
    assert sent(jobs.report(signed(DONE)))["expectedVersion"] == 3


def test_while_aws_has_not_answered_only_the_latest_report_is_kept() -> None:
    jobs = working()
    jobs.report(signed(JOB))
    assert jobs.report(signed(replace(JOB, progress=0.5))) == []
    assert jobs.report(signed(DONE)) == []
    body = sent(jobs.hear(f"{TOPIC}/job1/update/accepted", accepted(3)))
    assert (body["status"], body["expectedVersion"]) == ("SUCCEEDED", 3)
    assert jobs.hear(f"{TOPIC}/job1/update/accepted", accepted(4)) == jobs.start()
    assert jobs.execution is None


def test_a_version_that_does_not_match_is_sent_again_with_the_right_one() -> None:
    jobs = working()
    jobs.report(signed(FAILED))
    body = sent(jobs.hear(f"{TOPIC}/job1/update/rejected", rejected("VersionMismatch", 9)))
    assert (body["status"], body["expectedVersion"]) == ("FAILED", 9)
    assert body["statusDetails"]["reason"] == "wrong-answer"
    assert jobs.hear(f"{TOPIC}/job1/update/accepted", accepted(10)) == jobs.start()


def test_a_report_that_aws_does_not_want_is_dropped() -> None:
    jobs = working()
    jobs.report(signed(DONE))
    out = jobs.hear(f"{TOPIC}/job1/update/rejected", rejected("InvalidStateTransition", 5))
    assert out == jobs.start()


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_one_that_a_device_may_set(state: Any) -> None:
    body = sent(working().report(signed(replace(JOB, state=state))))
    assert body["status"] in ("IN_PROGRESS", "SUCCEEDED", "FAILED", "REJECTED")
    assert body["statusDetails"]["state"] == state


def test_another_program_s_job_is_left_alone() -> None:
    jobs = AwsJobs("robot-7")
    assert jobs.hear(f"{TOPIC}/start-next/accepted", started({"operation": "reboot"})) == []
    assert jobs.report(signed(JOB)) == []


@pytest.mark.parametrize(
    "payload",
    [
        b"[" * 200_000,
        b'{"execution": {"jobId": "a", "executionNumber": 1, "versionNumber": 1, "jobDocument": '
        b'{"operation": "edgecascade-order", "envelope": {"payload": "\\ud800"}}}}',
        b'{"execution": {"jobId": "a", "executionNumber": 1, "versionNumber": 1, "jobDocument": '
        b'{"operation": "edgecascade-order", "envelope": {"payload": 1e999}}}}',
        b'{"execution": {"jobId": "../#", "executionNumber": 1, "versionNumber": 1, "jobDocument": '
        b'{"operation": "edgecascade-order", "envelope": {}}}}',
    ],
    ids=["deep", "surrogate", "infinity", "topic"],
)
def test_a_hostile_carrier_is_not_understood(payload: bytes) -> None:
    jobs = AwsJobs("robot-7")
    assert jobs.hear(f"{TOPIC}/start-next/accepted", payload) == []
    assert jobs.execution is None


def test_long_evidence_fits_and_a_large_order_does_not() -> None:
    body = sent(working().report(signed(replace(FAILED, evidence={"message": "x" * 9000}))))
    assert max(map(len, body["statusDetails"].values())) <= 1024
    large = wire.encode({"payload": "x" * 33_000, "payloadType": "order", "signatures": []})
    with pytest.raises(InvalidRequest, match="32768"):
        aws_jobs.document(large)


NAMES = (
    "execution", "jobId", "executionNumber", "versionNumber", "jobDocument", "operation",
    "envelope", "executionState", "code", "config", "polling", "sleep", "_links", "href", "id",
    "deploymentBase", "deployment", "chunks", "artifacts", "filename", "hashes", "sha256", "size",
    "cancelAction",
)  # fmt: skip
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.lists(st.tuples(st.sampled_from((
    "notify-next", "start-next/accepted", "job1/update/accepted", "job1/update/rejected", "x",
)), json_values), max_size=6))  # fmt: skip
def test_aws_may_say_anything(messages: list[tuple[str, Any]]) -> None:
    for jobs in (AwsJobs("robot-7"), working()):
        for topic, value in messages:
            jobs.hear(f"{TOPIC}/{topic}", json.dumps(value).encode())
            jobs.report(signed(JOB))


LARGE = replace(
    FAILED,
    phase="p" * 100,
    evidence={"reason": "r" * 900, "message": "é" * 900, "log": "l" * 5000},
)


@pytest.mark.parametrize("job", [JOB, DONE, LARGE], ids=["begun", "done", "large"])
def test_the_signed_report_goes_along_unchanged(job: Job) -> None:
    """Who counts elsewhere can believe the device instead of the carrier."""
    report = signed(job)
    aws = sent(working().report(report))["statusDetails"]
    assert len(aws) <= 10
    assert max(map(len, aws.values())) <= 1024
    assert aws_jobs.signed_report(aws) == report
    details = hawkbit.feedback(report)["status"]["details"]
    assert max(map(len, details)) <= 512
    assert hawkbit.signed_report(details) == report
    ring = Keyring([KEY])
    assert ring.verify(report).state == job.state
    aws["report-0"] = aws["report-0"].replace("a", "b")
    with pytest.raises(ReportRefused):
        ring.verify(aws_jobs.signed_report(aws))


def test_what_is_no_report_is_not_passed_on() -> None:
    assert working().report(b"{}") == []
    with pytest.raises(InvalidRequest, match="no report"):
        hawkbit.feedback(b"{}")


URL = "https://hawkbit.example/DEFAULT/controller/v1/robot-7"
POLL = {
    "config": {"polling": {"sleep": "12:00:00"}},
    "_links": {
        "deploymentBase": {"href": f"{URL}/deploymentBase/8?c=-2127183556"},
        "installedBase": {"href": f"{URL}/installedBase/4"},
        "configData": {"href": f"{URL}/configData"},
    },
}


def deployment(data: bytes, filename: str = hawkbit.ARTIFACT) -> dict[str, Any]:
    link = "https://link-to-cdn.example/api/v1/TENANT/download/controller/robot-7/order"
    artifact = {
        "filename": filename,
        "hashes": {
            "sha1": hashlib.sha1(data).hexdigest(),
            "md5": hashlib.md5(data).hexdigest(),
            "sha256": hashlib.sha256(data).hexdigest(),
        },
        "size": len(data),
        "_links": {"download": {"href": link}, "md5sum": {"href": f"{link}.MD5SUM"}},
    }
    chunk = {"part": "bApp", "version": "1.0.75", "name": "model", "artifacts": [artifact]}
    return {
        "id": "8",
        "deployment": {
            "download": "forced",
            "update": "forced",
            "maintenanceWindow": "available",
            "chunks": [chunk],
        },
        "actionHistory": {"status": "RUNNING", "messages": ["Reboot"]},
    }


def test_a_poll_says_when_to_ask_again_and_where_the_action_is() -> None:
    poll = hawkbit.read_poll(wire.encode(POLL))
    assert poll.sleep_s == 43_200
    assert poll.deployment == f"{URL}/deploymentBase/8?c=-2127183556"
    assert poll.cancel is None
    idle = hawkbit.read_poll(b'{"config":{"polling":{"sleep":"00:00:00"}}}')
    assert (idle.sleep_s, idle.deployment) == (5.0, None), "a server may not make it a storm"


def test_the_order_is_the_artifact_that_was_named() -> None:
    found = hawkbit.read_deployment(wire.encode(deployment(ENVELOPE)))
    assert found.id == "8"
    assert found.checked(ENVELOPE) == ENVELOPE
    for other in (ENVELOPE[:-1], ENVELOPE[:-1] + b" ", b""):
        with pytest.raises(UpdateRefused, match="not the one"):
            found.checked(other)


def test_an_action_without_an_order_is_refused() -> None:
    for made, message in (
        (deployment(ENVELOPE, "binary.tgz"), "has 0 artifacts"),
        (deployment(b"x" * 70_000), "70000 bytes"),
    ):
        with pytest.raises(UpdateRefused, match=message):
            hawkbit.read_deployment(wire.encode(made))


@pytest.mark.parametrize(
    ("job", "execution", "finished"),
    [
        (replace(JOB, state="QUEUED"), "scheduled", "none"),
        (JOB, "proceeding", "none"),
        (DONE, "closed", "success"),
        (FAILED, "closed", "failure"),
        (replace(JOB, state="REJECTED"), "closed", "failure"),
        (replace(JOB, state="CANCELED"), "closed", "failure"),
    ],
)
def test_feedback_is_what_hawkbit_takes(job: Job, execution: str, finished: str) -> None:
    body = hawkbit.feedback(signed(job))
    assert body["timestamp"] == 1_795_440_000_500
    assert body["status"]["execution"] == execution
    assert body["status"]["result"]["finished"] == finished
    assert body["status"]["result"]["progress"] == {"cnt": round(100 * job.progress), "of": 100}
    assert body["status"]["details"][0] == "order o-1"


def test_a_cancel_is_not_signed_and_so_not_obeyed() -> None:
    assert hawkbit.read_cancel(b'{"id":"11","cancelAction":{"stopId":"8"}}') == "8"
    assert hawkbit.cancel_feedback(1.0)["status"]["execution"] == "rejected"


def test_addresses_are_those_of_the_controller() -> None:
    ddi = hawkbit.Ddi(URL)
    assert ddi.feedback_url("8") == f"{URL}/deploymentBase/8/feedback"
    assert ddi.cancel_url("8") == f"{URL}/cancelAction/8/feedback"
    assert ddi.owns(f"{URL}/deploymentBase/8")
    assert not ddi.owns("https://elsewhere.example/DEFAULT")


@given(json_values)
def test_hawkbit_may_say_anything(value: Any) -> None:
    for read in (hawkbit.read_poll, hawkbit.read_deployment, hawkbit.read_cancel):
        for body in (value, {**deployment(ENVELOPE), "deployment": value}):
            with suppress(UpdateRefused):
                read(json.dumps(body).encode())
