# SPDX-License-Identifier: Apache-2.0
"""Brokers, and a service around the demo's bundle."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import installed
import pytest
from golden import Build
from serving import WAIT_S, Connect, Serve

from edgecascade import LLM
from edgecascade.client import Client
from edgecascade.service.broker import LocalBroker
from edgecascade.service.config import ServiceConfig
from edgecascade.service.service import Service


@pytest.fixture
def mosquitto() -> Iterator[LocalBroker]:
    with LocalBroker(installed.broker("mosquitto")) as broker:
        yield broker


@pytest.fixture(params=["mosquitto", "iotcore"])
def any_broker(request: pytest.FixtureRequest) -> Iterator[LocalBroker]:
    with LocalBroker(installed.broker(request.param)) as broker:
        yield broker


@pytest.fixture(scope="session")
def bundle(build: Build) -> Path:
    return build("tiny", "speed")


@pytest.fixture(scope="module")
def llm(bundle: Path) -> Iterator[LLM]:
    with LLM.load(bundle, slots=4) as loaded:
        yield loaded


@pytest.fixture
def serve(llm: LLM, mosquitto: LocalBroker, tmp_path: Path) -> Iterator[Serve]:
    """serve(**config) -> a service that runs until the end of the test."""
    with ExitStack() as stack:

        def start(**options: Any) -> Service:
            values = {"mqtt": mosquitto.url, "device_id": "dev-1", "state_dir": str(tmp_path)}
            config = ServiceConfig(**{**values, "telemetry_s": 3600.0, **options})
            service = stack.enter_context(Service(llm, config))
            thread = threading.Thread(target=service.run)
            stack.callback(thread.join)
            stack.callback(service.stop)
            thread.start()
            assert service.wait_ready(WAIT_S)
            return service

        yield start


@pytest.fixture
def connect(mosquitto: LocalBroker) -> Iterator[Connect]:
    """connect(name) -> a client until the end of the test."""
    with ExitStack() as stack:
        yield lambda name=None, **options: stack.enter_context(
            Client(mosquitto.url, client_id=name, **options)
        )
