# SPDX-License-Identifier: Apache-2.0
"""`edgecascade fleet` from an empty folder to a rollback: virtual devices, a real broker."""

from __future__ import annotations

import argparse
import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import installed
import pytest
from golden import Build
from virtual_devices import virtual_devices

from edgecascade.cli import main, plan
from edgecascade.errors import InvalidRequest
from edgecascade.fleet import audit
from edgecascade.fleet.faults.virtual import VirtualFleet
from edgecascade.fleet.home import Home, rate, stages, window
from edgecascade.fleet.orders import unverified
from edgecascade.service.broker import LocalBroker
from edgecascade.service.config import broker_address
from edgecascade.service.mqtt import Link, LinkOptions
from edgecascade.service.replies import Outgoing
from edgecascade.service.topics import Topics

DEVICES = 20
QUICK = ("--soak", "0", "--lost-after", "60")


@pytest.fixture(scope="module")
def broker() -> Iterator[LocalBroker]:
    with LocalBroker(installed.broker()) as running:
        yield running


@pytest.fixture(scope="module")
def prepared(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An operator's folder with two releases."""
    folder = tmp_path_factory.mktemp("operator") / "fleet"
    assert main(["fleet", "init", "--fleet", str(folder)]) == 0
    for version, precision in (("1.0", "exact"), ("2.0", "speed")):
        bundle = str(build("tiny", precision))
        golden = ("--golden", "Drive to the dock.") if version == "2.0" else ()
        named = ("--name", "tiny", "--version", version, "--fleet", str(folder))
        assert main(["fleet", "publish", bundle, *named, *golden]) == 0
    return folder


class Shell:
    """Runs commands as an operator types them; each test has a group of its own."""

    def __init__(self, home: Home, broker: LocalBroker, group: str, out: Any) -> None:
        self.home, self.broker, self.group, self._out = home, broker, group, out
        self._begun: list[subprocess.Popen[str]] = []

    def run(self, *words: str) -> int:
        self._out.readouterr()
        connection = ("--mqtt", self.broker.url)
        return main(["fleet", words[0], *words[1:], "--fleet", str(self.home.folder), *connection])

    def rollout(self, *words: str) -> int:
        return self.run("rollout", "tiny", *words, "--group", self.group, *QUICK)

    def begin(self, *words: str, lines: int = 3) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        """A rollout in a process of its own, after it said so much, or all."""
        options = ("--group", self.group, "--fleet", str(self.home.folder), *QUICK, "--json")
        command = [sys.executable, "-m", "edgecascade", "fleet", "rollout", "tiny", *options]
        process = subprocess.Popen(
            [*command, "--mqtt", self.broker.url, *words], stdout=subprocess.PIPE, text=True
        )
        self._begun.append(process)
        assert process.stdout is not None
        return process, json.loads(list(islice(process.stdout, lines))[-1])

    def close(self) -> None:
        """A test that failed half-way leaves no controller behind."""
        for process in self._begun:
            with process:
                process.kill()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._out.readouterr().out.splitlines()]

    def text(self) -> str:
        said: str = self._out.readouterr().out
        return said

    def forget_order(self) -> None:
        """Somebody who owns the broker takes the group's order away."""
        options = LinkOptions(broker_address(self.broker.url), "owner", (), forget=True)
        link = Link(options, lambda message: None)
        link.start()
        try:
            assert link.wait_up(30.0)
            link.publish(Outgoing(Topics().announce(self.group), b"", retain=True))
            assert link.flush(30.0)
        finally:
            link.stop()

    def document(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self._out.readouterr().out)
        return value

    @contextmanager
    def devices(self, count: int = DEVICES, **behaviour: Any) -> Iterator[VirtualFleet]:
        port, keys = self.broker.port, self.home.repository().order_keys()
        with virtual_devices(port, keys, count, group=self.group, **behaviour) as fleet:
            self.home.register.enroll(fleet.keys_of(count), time.time())
            yield fleet


@pytest.fixture
def shell(
    prepared: Path,
    broker: LocalBroker,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Shell]:
    with closing(Shell(Home(prepared), broker, request.node.name[5:60], capsys)) as opened:
        yield opened


def test_a_rollout_and_its_rollback(shell: Shell) -> None:
    with shell.devices() as fleet:
        assert shell.rollout("--json") == 0
        lines = shell.lines()
        assert [line["stage"] for line in lines] == sorted(line["stage"] for line in lines)
        assert lines[-1]["state"] == "done"
        assert lines[-1]["release"] == "tiny 2.0"
        assert lines[-1]["succeeded"] == DEVICES
        assert shell.run("status", "--json") == 0
        shown = shell.document()
        assert {device["job"]["state"] for device in shown["devices"].values()} == {"SUCCEEDED"}
        assert shell.run("rollback") == 0
        assert {device.job.state for device in fleet.devices if device.job} == {"CANCELED"}
        assert shell.run("status", "--json") == 0
        assert shell.document()["order_trouble"] == ""
        shell.forget_order()
        assert shell.run("status") == 0
        assert f"the broker retains no order for group '{shell.group}'" in shell.text()
        assert shell.run("rollback") == 0
        assert shell.run("status", "--json") == 0
        assert shell.document()["order_trouble"] == "", "it was said again"
    envelope = (shell.home.served / "orders" / f"{shell.group}.json").read_bytes()
    assert unverified(envelope).action == "rollback", "for devices without a broker, too"


def test_a_bad_bundle_says_why_and_the_exit_status_tells(
    shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    with shell.devices(fails=1.0):
        assert shell.rollout("1.0") == 3
        out = capsys.readouterr().out
        assert "aborted (nobody succeeded: 1 failed, 0 rejected)" in out
        assert "failed: dice" in out


def test_a_rollout_needs_devices_that_are_enrolled(
    shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shell.rollout() == 1
    said = capsys.readouterr().err
    assert f"no device of group '{shell.group}' is enrolled" in said
    assert "edgecascade agent enroll" in said
    assert "edgecascade fleet devices --enroll" in said
    with shell.devices(2):
        assert shell.rollout("--first", "robot-9") == 1
        assert "'robot-9' is not enrolled" in capsys.readouterr().err


def test_silent_devices_are_named_and_the_operator_goes_on_without_them(
    shell: Shell, capsys: pytest.CaptureFixture[str]
) -> None:
    with shell.devices(2) as fleet:
        shell.home.register.enroll(fleet.keys_of(3), time.time())
        process, said = shell.begin("--stages", "first,100", lines=1)
        assert process.stdout is not None
        while said["succeeded"] < 2:
            said = json.loads(process.stdout.readline())
        assert (said["state"], said["silent"]) == ("running", 1), "two of three are not enough"
        assert shell.run("status") == 0
        assert "silent: v00002" in capsys.readouterr().out
        assert shell.run("pause") == 0
        process.communicate()
        assert process.returncode == 3
        assert shell.run("resume", "--json") == 0
        last = shell.lines()[-1]
    assert (last["state"], last["succeeded"], last["accepted"]) == ("done", 2, 1)


def test_one_rollout_at_a_time_in_a_group(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    with shell.devices():
        process, said = shell.begin("--soak", "600", lines=1)
        process.kill()
        process.communicate()
        assert said["state"] == "running"
        assert shell.rollout("1.0") == 1
        assert f"edgecascade fleet abort {said['order']}" in capsys.readouterr().err
        assert shell.run("abort", said["order"]) == 0
        assert shell.rollout("1.0") == 0


def test_a_rollout_goes_on_as_it_began(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    began = ("--pass-percent", "80", "--stages", "first,100", "--limit", "20Mbit")
    with shell.devices(2):
        process, said = shell.begin("--soak", "600", *began, lines=1)
        process.kill()
        process.communicate()
        order, other = said["order"], ("--limit", "20000kbit", "--stages", "first,5,100")
        assert shell.run("rollout", "tiny", "--group", shell.group, *other, "--soak", "5") == 1
        said = capsys.readouterr().err
        assert (
            f"{order} goes on with --stages first,100, not first,5,100; --soak 600, not 5" in said
        )
        assert f"edgecascade fleet abort {order} --mqtt {shell.broker.url}" in said
        assert shell.run("rollout", "tiny", "--group", shell.group, "--order", "another") == 1
        assert f"{order} goes on with --order {order}, not another" in capsys.readouterr().err
        process, _ = shell.begin("--soak", "600", *began, lines=1)  # the same is no other
        assert process.poll() is None
        assert shell.run("abort", order) == 0


def test_every_option_of_a_plan_can_be_compared(prepared: Path) -> None:
    parser = argparse.ArgumentParser()
    plan.add_options(parser)
    options = {action.dest for action in parser._actions if action.option_strings}
    assert options - {"help", "group"} == plan.SHOWN.keys()
    words = {
        "order": "o", "stages": "first,1.5,100", "first": "r", "mirror": "http://m/",
        "egress": "5000kbit", "limit": "3kbit", "parallel": "2",
        "window": "sat,sun:01:30+180@Europe/Berlin", "soak": "7", "lost_after": "8",
        "pass_percent": "70", "fail_percent": "9", "tolerate_lost": "3", "retries": "1",
        "valid_days": "2",
    }  # fmt: skip
    given = [f"--{name.replace('_', '-')}={word}" for name, word in words.items()]
    args = parser.parse_args(["tiny", "--group", "g", "--allow-downgrade", *given])
    release, sha256 = Home(prepared).repository().release("tiny")
    made = plan.new_record(args, release, sha256)
    shown = {name: show(value(made)) for name, (value, show) in plan.SHOWN.items()}
    assert shown == {**words, "allow_downgrade": "true"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--soak", "2591999"), "--soak 2592000, not 2591999"),
        (("--pass-percent", "95.000001"), "--pass-percent 95, not 95.000001"),
        (("1.0",), "end it first"),
    ],
)
def test_a_rollout_that_is_refused_tells_no_password(
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    said: str,
) -> None:
    home = Home(shutil.copytree(prepared, tmp_path / "fleet"))
    parser = argparse.ArgumentParser()
    plan.add_options(parser)
    began = parser.parse_args(["tiny", "--group", "g", "--soak", "2592000"])
    with home.records.locked():
        home.records.write(plan.new_record(began, *home.repository().release("tiny")))
    where = ("--fleet", str(home.folder), "--mqtt", "mqtt://maria:hunter2@127.0.0.1:1")
    assert main(["fleet", "rollout", "tiny", *words, "--group", "g", *where]) == 1
    told = capsys.readouterr().err
    assert said in told
    assert "--mqtt mqtt://127.0.0.1:1" in told
    assert "hunter2" not in told


@pytest.mark.parametrize(
    ("option", "typed", "said"),
    [
        ("--pass-percent", "200", "'200' is no number from 50 to 100"),
        ("--fail-percent", "-1", "'-1' is no number from 0 to 100"),
        ("--soak", "nan", "'nan' is no number from 0 to 2592000"),
        ("--lost-after", "0", "'0' is no number from 1 to 86400"),
        ("--tolerate-lost", "-1", "'-1' is no whole number of 0 or more"),
        ("--retries", "-1", "'-1' is no whole number of 0 or more"),
    ],
)
def test_a_number_that_cannot_be_is_named_as_it_was_typed(
    shell: Shell, capsys: pytest.CaptureFixture[str], option: str, typed: str, said: str
) -> None:
    with pytest.raises(SystemExit):
        shell.run("rollout", "tiny", "--group", "g", option, typed)
    assert f"argument {option}: {said}" in capsys.readouterr().err


def test_commands_name_what_is_wrong(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (("rollout", "tiny", "9.9", "--group", "g"), "no release tiny 9.9"),
        (("rollout", "tiny", "--group", "a b"), "group is 'a b'"),
        (("rollout", "tiny", "--group", "g", "--egress", "fast"), "'fast' is no rate"),
        (("rollout", "tiny", "--group", "g", "--stages", "5,1"), "rising percentages"),
        (("rollout", "tiny", "--group", "g", "--mirror", "ftp://x/"), "mirrors is 'ftp://x/'"),
        (("status", "nothing"), "no rollout 'nothing'"),
    ):
        assert shell.run(*words) == 1
        assert message in capsys.readouterr().err


def test_a_health_that_is_asked_for_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tmp_path / "health.yaml"
    asked.write_text("min_tok_s: 8\nmin_tok_s: 0\n")
    words = ["publish", "bundle", "--name", "tiny", "--version", "1", "--health", str(asked)]
    assert main(["fleet", *words, "--fleet", str(tmp_path)]) == 1
    assert "sets 'min_tok_s' twice" in capsys.readouterr().err


def test_a_killed_controller_goes_on_when_the_command_is_given_again(shell: Shell) -> None:
    kills = 0
    with shell.devices(phase_s=0.15) as fleet:
        while True:
            process, said = shell.begin(lines=2)
            if said["state"] != "running":
                break
            process.kill()
            process.communicate()
            kills += 1
        process.communicate()
        assert process.returncode == 0
        assert said["state"] == "done"
        assert fleet.exposed == DEVICES
    assert kills >= 2
    audit.verify(shell.home.log)


def test_keys_are_shown_added_and_revoked(shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--fleet", str(shell.home.folder), "--json")
    assert main(["fleet", "keys", *where, "--add-operator", "maria", "--group", "site-7"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [key["name"] for key in shown["operators"]] == ["operator", "maria"]
    assert main(["fleet", "keys", *where, "--revoke-operator", "maria"]) == 0
    assert main(["fleet", "keys", *where, "--rotate", "timestamp"]) == 0
    assert main(["fleet", "keys", *where, "--refresh"]) == 0
    root = (shell.home.folder / "root.json").read_bytes()
    assert root == shell.home.repository().root_json
    assert main(["fleet", "audit", "--verify", "--fleet", str(shell.home.folder)]) == 0
    events = [record["event"] for _, record in audit.records(shell.home.log) if record]
    assert events[-4:] == ["keys-add", "keys-revoke", "keys-rotate", "keys-refresh"]


def test_what_an_init_that_was_killed_left_out_is_made_up_for(tmp_path: Path, build: Build) -> None:
    fleet = ("--fleet", str(tmp_path))
    named = (str(build("tiny", "exact")), "--name", "tiny", "--version", "1")
    assert main(["fleet", "init", *fleet]) == 0
    given = (tmp_path / "root.json").read_bytes()
    for words in (("publish", *named), ("keys", "--refresh")):
        (tmp_path / "root.json").unlink()
        assert main(["fleet", *words, *fleet]) == 0
        assert (tmp_path / "root.json").read_bytes() == given


def test_the_way_out_of_no_repository_can_be_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--fleet", str(tmp_path / "mine"))
    for _ in ("no folder", "an empty one"):
        assert main(["fleet", "keys", *where]) == 1
        command = capsys.readouterr().err.partition("make one: edgecascade ")[2].split()
        assert command == ["fleet", "init", *where]
        (tmp_path / "mine" / "repository" / "metadata").mkdir(parents=True, exist_ok=True)
    shutil.rmtree(tmp_path / "mine")
    assert main(command) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--lost", "ab12"), "--lost ab12 is of --rotate"),
        (("--lost", "ab12", "--refresh"), "--lost ab12 is of --rotate"),
        (("--group", "site-7"), "--group site-7 is of --add-operator"),
        (("--group", "site-7", "--revoke-operator", "maria"), "--group site-7 is of"),
    ],
)
def test_an_option_of_keys_that_would_do_nothing_is_refused(
    shell: Shell, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert main(["fleet", "keys", "--fleet", str(shell.home.folder), *words]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "kbit_s"),
    [("10Gbit", 10_000_000.0), ("200 Mbit/s", 200_000.0), ("1.5kbit", 1.5), ("500bit", 0.5)],
)
def test_rates(text: str, kbit_s: float) -> None:
    assert rate(text) == kbit_s


def test_stages_and_windows_are_read() -> None:
    assert stages("first,1,5%,100") == (0.0, 1.0, 5.0, 100.0)
    assert window("sat,sun:01:30+180@Europe/Berlin").days == (5, 6)
    assert window("01:30+180@UTC").minutes == 180


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (rate, "10 Gigabit"),
        (rate, "0Mbit"),
        (stages, "one,all"),
        (window, "01:30"),
        (window, "1:30+180@UTC"),
        (window, "01:30+9999@UTC"),
        (window, "01:30+60@Mars/Base"),
        (window, "someday:01:30+60@UTC"),
    ],
)
def test_what_cannot_be_read_is_refused(read: Any, text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"write|window"):
        read(text)


def test_a_terminal_is_shown_the_stages(shell: Shell, tmp_path: Path) -> None:
    with shell.devices():
        command = [sys.executable, "-m", "edgecascade", "fleet", "rollout", "tiny", *QUICK]
        command += ["--group", shell.group, "--fleet", str(shell.home.folder)]
        ours, theirs = pty.openpty()
        process = subprocess.Popen([*command, "--mqtt", shell.broker.url], stdout=theirs)
        os.close(theirs)
        seen = b""
        with suppress(OSError), open(ours, "rb", buffering=0) as screen:  # its end is an error
            while piece := screen.read(4096):
                seen += piece
        assert process.wait() == 0
    for part in (b"1 device", b"25 %", b"done (20 of 20 succeeded)", b"20 succeeded"):
        assert part in seen
