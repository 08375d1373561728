# SPDX-License-Identifier: Apache-2.0
"""A report of a device survives the wire, and nothing else is taken for one."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner

from edgecascade.fleet import reports
from edgecascade.fleet.jobs import MAX_JOB_BYTES, STATES, Job, first_to_forget, read_job

JOB = Job(
    "2026-11-23-a", 412, "robot-7", "FAILED", "probation", 0.5, 7, "a", "b", {"n": 1}, 12.5,
    "site-7", "ab" * 32,
)  # fmt: skip


SIGNER = CryptoSigner.generate_ed25519()


@pytest.mark.parametrize("state", STATES)
def test_a_report_comes_back_as_it_was(state: Any) -> None:
    job = Job("order", 1, "robot-7", state)
    assert read_job(job.to_bytes()) == job
    assert read_job(JOB.to_bytes()) == JOB


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"state": "DONE"},
        {"state": ["FAILED"]},
        {"progress": 1.5},
        {"progress": "1"},
        {"seq": True},
        {"seq": -1},
        {"version": 1.5},
        {"evidence": []},
        {"order": 5},
        {"device": "x" * 2000},
        {"ts": None},
        {"group": 7},
        {"release": None},
        {"extra": 1},
    ],
    ids=str,
)
def test_what_is_not_a_report_is_none(change: dict[str, Any]) -> None:
    assert read_job(json.dumps(json.loads(JOB.to_bytes()) | change).encode()) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_read_without_an_error(payload: bytes) -> None:
    assert read_job(payload) is None


def test_a_report_is_bounded_and_keeps_its_reason() -> None:
    evidence = {"reason": "wrong-answer", "message": "m" * 50_000, "log": "l" * 100_000}
    payload = Job("order", 1, "robot-7", "FAILED", evidence=evidence).to_bytes()
    assert len(payload) <= MAX_JOB_BYTES
    job = read_job(payload)
    assert job is not None
    assert job.evidence["reason"] == "wrong-answer"
    assert read_job(payload + b" " * MAX_JOB_BYTES) is None


@given(st.text(max_size=3000), st.text(max_size=3000), st.text(max_size=3000))
def test_a_report_fits_every_carrier(reason: str, message: str, more: str) -> None:
    evidence = {"reason": reason, "message": message, "more": more}
    with suppress(UnicodeEncodeError):  # a lone surrogate
        for text in (reason, message, more):
            text.encode()
        job = replace(JOB, evidence=evidence)
        assert len(job.to_bytes()) <= MAX_JOB_BYTES
        assert len(reports.sign(job, SIGNER)) <= reports.MAX_REPORT_BYTES


def test_orders_that_were_refused_push_no_other_report_out() -> None:
    jobs = {name: replace(JOB, order=name) for name in ("a", "b", "c")}
    assert first_to_forget(jobs) == "a"
    jobs["b"] = replace(JOB, order="b", release="")
    assert first_to_forget(jobs) == "b"
