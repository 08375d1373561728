# SPDX-License-Identifier: Apache-2.0
"""The examples and the docs' own commands run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from serving import WAIT_S, Serve

from edgecascade.service.broker import LocalBroker
from edgecascade.service.config import ServiceConfig
from edgecascade.service.parameters import PARAMETERS

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs" / "mqtt.md").read_text()


def test_the_python_example(serve: Serve, mosquitto: LocalBroker) -> None:
    serve()
    command = [sys.executable, str(ROOT / "examples" / "ask_over_mqtt.py"), mosquitto.url, "hello"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=WAIT_S)
    assert "dev-1: online, 0 of 4 slots busy" in done.stdout
    assert re.search(r"\ndev-1: (stop|length), \d+ tokens\n$", done.stdout)


def test_the_shell_example(serve: Serve, mosquitto: LocalBroker) -> None:
    if shutil.which("mosquitto_sub") is None:
        pytest.skip("mosquitto_sub is not installed: sudo apt install mosquitto-clients")
    serve()
    script = str(ROOT / "examples" / "ask_over_mqtt.sh")
    command = [script, "127.0.0.1", str(mosquitto.port), "dev-1", "hello"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=WAIT_S)
    *chunks, final = map(json.loads, done.stdout.splitlines())
    assert [chunk["seq"] for chunk in chunks] == list(range(final["chunks"]))


def test_the_docs_name_every_parameter_and_every_key() -> None:
    known = set(re.findall(r"`([a-z_]+)`", DOCS)) | set(re.findall(r"`([a-z_]+)\.", DOCS))
    assert set(PARAMETERS) - known == set()
    assert {name for name in ServiceConfig.__dataclass_fields__ if name not in known} == set()


def test_the_docs_name_every_error() -> None:
    sources = [ROOT / "edgecascade" / "service" / f"{name}.py" for name in
               ("protocol", "parameters", "core", "report")]  # fmt: skip
    text = "".join(path.read_text() for path in sources)
    codes = set(re.findall(r"(?:refuse|Problem)\(\s*\d{3},\s*\"([a-z_]+)\"", text))
    assert len(codes) > 15
    assert {code for code in codes if f"`{code}`" not in DOCS} == set()
