# SPDX-License-Identifier: Apache-2.0
"""A service's settings: strict keys, options over the file, errors that name the key."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from edgecascade.errors import InvalidRequest
from edgecascade.service.config import (
    PASSWORD_VARIABLE,
    ServiceConfig,
    add_options,
    broker_address,
    from_options,
    read_file,
    state_folder,
)
from edgecascade.service.mqtt import Link, LinkOptions


def parse(*words: str) -> ServiceConfig:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return from_options(parser.parse_args(words))


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "service.yaml"
    path.write_text(text)
    return str(path)


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "mqtt: mqtt://broker:1884\n"
        "device_id: dev-1\n"
        "flush_ms: 80\n"
        "requests_per_minute: 30\n"
        "priority_clients: [boss, 'chief']\n"
        "pool: null\n",
    )
    config = parse("--config", path, "--device-id", "dev-2")
    assert (config.device_id, config.flush_ms) == ("dev-2", 80)
    assert config.requests_per_minute == 30.0
    assert config.priority_clients == ("boss", "chief")
    assert (config.address().host, config.address().port) == ("broker", 1884)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mqtt: mqtt://b\ndevice-id: d\n", "'device-id'"),
        ("mqtt: mqtt://b\ndevice_id: no\n", "device_id to False"),
        ("mqtt: mqtt://b\nflush_ms: '40'\n", "flush_ms to '40'"),
        ("mqtt: mqtt://b\nflush_ms: true\n", "flush_ms to True"),
        ("mqtt: mqtt://b\nclients: boss\n", "clients to 'boss'"),
        ("mqtt: mqtt://b\nmqtt: mqtt://c\n", "'mqtt' twice"),
        ("mqtt: [\n", "not YAML"),
        ("? [a]\n: 1\n", "not YAML"),
        ("- mqtt\n", "no keys"),
        ("", "no keys"),
    ],
)
def test_a_file_that_cannot_be_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words.replace("[", r"\[")):
        read_file(write(tmp_path, text))


def test_a_missing_key_is_named() -> None:
    with pytest.raises(InvalidRequest, match="--device-id"):
        parse("--mqtt", "mqtt://broker")
    with pytest.raises(InvalidRequest, match="nowhere"):
        parse("--config", "nowhere.yaml")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device_id", "dev/1"),
        ("device_id", ""),
        ("pool", "a b"),
        ("prefix", "/x"),
        ("prefix", "a/b/c/d/e"),
        ("prefix", "a/+"),
        ("keepalive_s", 1),
        ("flush_ms", -1),
        ("max_request_bytes", 1),
        ("profile", "wan"),
        ("model", ""),
        ("clients", ("a/b",)),
        ("max_timeout_s", float("nan")),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: object) -> None:
    given = {"mqtt": "mqtt://b", "device_id": "dev-1", name: value}
    shown = repr(value[0] if isinstance(value, tuple) else value)
    with pytest.raises(InvalidRequest, match=re.escape(shown)):
        ServiceConfig(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "url",
    [
        "broker",
        "http://b",
        "mqtt://",
        "mqtt://b:99999",
        "mqtt://b:0",
        "mqtt://b/topic",
        "mqtt://b?keepalive=5",
        "mqtt://b#x",
        "mqtt://[::1",
        "://",
    ],
)
def test_an_address_that_cannot_be_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequest, match="broker"):
        broker_address(url)


@pytest.mark.parametrize(
    "url",
    [
        "mqtt://me:secret@b:0",
        "mqtt://me:secret@b:99999",
        "x://:secret@",
        "x://me:se:secret@b",
        "x://me:secret@secret@b",
        "mqtt://me:secret/secret@b",
        "mqtt://me:secret#secret@b",
        "mqtt://me:secret?secret\n@b",
        "me:secret@b",
    ],
)
def test_a_refused_address_is_shown_without_its_password(url: str) -> None:
    with pytest.raises(InvalidRequest, match="broker") as caught:
        broker_address(url)
    assert "secret" not in str(caught.value)


def test_addresses() -> None:
    plain = broker_address("mqtt://me:p%40ss@broker")
    assert (plain.port, plain.tls, plain.username, plain.password) == (1883, False, "me", "p@ss")
    assert "p@ss" not in plain.shown
    secure = broker_address("mqtts://[::1]:9999")
    assert (secure.host, secure.port, secure.tls) == ("::1", 9999, True)
    assert secure.shown == "mqtts://[::1]:9999"


def test_certificates_come_in_pairs_and_over_tls(tmp_path: Path) -> None:
    pem = tmp_path / "a.pem"
    pem.write_text("")
    with pytest.raises(InvalidRequest, match="both cert and key"):
        broker_address("mqtts://b", cert_file=pem)
    with pytest.raises(InvalidRequest, match="not mqtts"):
        broker_address("mqtt://b", ca_file=pem)
    with pytest.raises(InvalidRequest, match=r"nowhere\.pem"):
        broker_address("mqtts://b", ca_file="nowhere.pem")


def test_the_password_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "password"
    secret.write_text("from file\n")
    config = ServiceConfig(mqtt="mqtt://b", device_id="d", username="d")
    monkeypatch.setenv(PASSWORD_VARIABLE, "from environment")
    assert config.address().password == "from environment"
    filed = ServiceConfig(mqtt="mqtt://d@b", device_id="d", password_file=str(secret))
    assert filed.address().secret() == "from file"
    secret.write_text("renewed\n")
    assert filed.address().secret() == "renewed"
    with pytest.raises(InvalidRequest, match="without a username"):
        ServiceConfig(mqtt="mqtt://b", device_id="d", password_file=str(secret)).address()


def test_the_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = ServiceConfig(mqtt="mqtt://b", device_id="d")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert state_folder(config) == tmp_path / "edgecascade"
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/edgecascade:/other")
    assert state_folder(config) == Path("/var/lib/edgecascade")
    named = ServiceConfig(mqtt="mqtt://b", device_id="d", state_dir=str(tmp_path / "mine"))
    assert state_folder(named) == tmp_path / "mine"


@pytest.mark.parametrize(
    ("url", "private"),
    [
        ("mqtts://broker", True),
        ("mqtt://127.0.0.1", True),
        ("mqtt://[::1]:1884", True),
        ("mqtt://localhost", True),
        ("mqtt://broker", False),
        ("mqtt://192.168.0.7", False),
        ("mqtt://localhost.evil.example", False),
    ],
)
def test_a_password_in_the_clear_is_warned_of(
    caplog: pytest.LogCaptureFixture, url: str, private: bool
) -> None:
    link = Link(LinkOptions(broker_address(url, username="me", password="hidden"), "me", ()), print)
    link._run = lambda bell: None  # type: ignore[method-assign]  # nobody is to be connected to
    link.start()
    link.stop()
    assert ("in the clear: use mqtts://" in caplog.text) != private
    assert "hidden" not in caplog.text
