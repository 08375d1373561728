# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecascade.errors import FleetError, UpdateRefused
from edgecascade.fleet import orders, release, strict
from edgecascade.fleet.keys import KeyFolders
from edgecascade.fleet.orders import (
    Cohort,
    Limits,
    Order,
    OrderKey,
    OrderKeys,
    Policy,
    Window,
    point,
)
from edgecascade.fleet.release import (
    DeltaRef,
    FileRef,
    GoldenPrompt,
    Health,
    Release,
    Requires,
)
from edgecascade.service.wire import MAX_INTEGER

NOW = 1_800_000_000.0
ORDER = Order(
    order="2026-11-23-a",
    seq=412,
    group="site-7",
    bundle="assistant",
    version="2.3.0",
    release_sha256="ab" * 32,
    not_before=NOW - 10,
    expires=NOW + 10,
    window=Window("Europe/Berlin", "01:30", 180, (0, 6)),
    cohort=Cohort("412", 5),
    limits=Limits(20_000, 4),
    policy=Policy(2, True),
    mirrors=("http://cache.lan:8080/", "https://cdn.example/fleet/"),
)
SIGNERS = tuple(OrderKey(f"key-{number}", f"{number:064x}") for number in range(65))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyFolders:
    made = KeyFolders([tmp_path_factory.mktemp("keys")])
    for _ in range(3):
        made.generate("orders")
    return made


def known(keys: KeyFolders, threshold: int = 1, epoch: int = 0) -> OrderKeys:
    owners = ("alice", "bob", "carol")
    pairs = zip(owners, keys.keys("orders"), strict=True)
    return OrderKeys(threshold, epoch, tuple(OrderKey(name, key.public) for name, key in pairs))


def test_order_survives_its_envelope(keys: KeyFolders) -> None:
    signers = [key.signer for key in keys.keys("orders")]
    envelope = orders.sign(ORDER, signers)
    assert orders.verify(envelope, known(keys, threshold=3), NOW) == ORDER
    assert orders.sign(ORDER, signers) == envelope
    assert orders.unverified(envelope) == ORDER


def test_threshold_counts_different_keys(keys: KeyFolders) -> None:
    first, second, _ = (key.signer for key in keys.keys("orders"))
    with pytest.raises(UpdateRefused, match="signed by 1 keys that this fleet trusts, 2 are"):
        orders.verify(orders.sign(ORDER, [first, first]), known(keys, threshold=2), NOW)
    assert orders.verify(orders.sign(ORDER, [second, first]), known(keys, threshold=2), NOW)


def test_key_of_some_groups_signs_for_those_only(keys: KeyFolders) -> None:
    key = keys.keys("orders")[0]
    mine = OrderKeys(1, 0, (OrderKey("alice", key.public, ("site-7", "site-9")),))
    assert orders.verify(orders.sign(ORDER, [key.signer]), mine, NOW) == ORDER
    elsewhere = orders.sign(replace(ORDER, group="site-8"), [key.signer])
    with pytest.raises(UpdateRefused, match="for group 'site-8' is signed by 0 keys that may"):
        orders.verify(elsewhere, mine, NOW)


@pytest.mark.parametrize(
    ("now", "reason"), [(NOW - 11, "too-early"), (NOW + 10, "expired"), (NOW + 1e9, "expired")]
)
def test_order_is_in_force_from_the_first_to_the_last_second(
    keys: KeyFolders, now: float, reason: str
) -> None:
    envelope = orders.sign(ORDER, [keys.keys("orders")[0].signer])
    with pytest.raises(UpdateRefused) as caught:
        orders.verify(envelope, known(keys), now)
    assert caught.value.reason == reason
    for good in (NOW - 10, NOW + 9.99):
        assert orders.verify(envelope, known(keys), good)


def test_numbers_of_another_epoch_are_refused(keys: KeyFolders) -> None:
    signer = keys.keys("orders")[0].signer
    later = known(keys, epoch=3)
    assert later.first_seq == 3 << 32
    assert known(keys).first_seq == 1
    for seq, good in ((412, False), (3 << 32, True), ((4 << 32) - 1, True), (4 << 32, False)):
        envelope = orders.sign(replace(ORDER, seq=seq), [signer])
        if good:
            assert orders.verify(envelope, later, NOW).seq == seq
        else:
            with pytest.raises(UpdateRefused, match="the keys are in epoch 3"):
                orders.verify(envelope, later, NOW)


def test_window_in_an_unknown_time_zone_is_refused(keys: KeyFolders) -> None:
    order = replace(ORDER, window=Window("Mars/Olympus", "01:30", 60))
    with pytest.raises(UpdateRefused, match="'Mars/Olympus', a time zone that this device") as e:
        orders.verify(orders.sign(order, [keys.keys("orders")[0].signer]), known(keys), NOW)
    assert e.value.reason == "time-zone"


def test_keys_survive_their_document(keys: KeyFolders) -> None:
    assert OrderKeys.parse(known(keys, 2, 5).to_bytes()) == known(keys, 2, 5)
    with pytest.raises(UpdateRefused, match="order keys"):
        OrderKeys.parse(b"{}")
    with pytest.raises(ValueError, match="threshold is 4"):
        known(keys, threshold=4)


def test_wider_cohort_keeps_everyone_and_has_its_share() -> None:
    devices = [f"robot-{i}" for i in range(10_000)]
    inside: set[str] = set()
    for percent in (0, 0.5, 1, 5, 25, 100):
        cohort = Cohort("salt", percent)
        more = {device for device in devices if cohort.includes(device)}
        assert inside <= more
        assert abs(len(more) - 100 * percent) < 5 * (100 * percent) ** 0.5 + 1
        inside = more
    assert inside == set(devices)
    assert not any(Cohort("salt", 0).includes(device) for device in devices)


def test_point_is_the_same_everywhere() -> None:
    assert point("412", "robot-1") == pytest.approx(46.1531, abs=0.0001)
    assert point("413", "robot-1") != point("412", "robot-1")


def test_order_concerns_its_group_its_device_and_its_cohort() -> None:
    everyone = replace(ORDER, cohort=Cohort("", 100))
    assert everyone.concerns("robot-1", ["site-1", "site-7"])
    assert not everyone.concerns("robot-1", ["site-1"])
    assert replace(everyone, device="robot-1").concerns("robot-1", ["site-7"])
    assert not replace(everyone, device="robot-2").concerns("robot-1", ["site-7"])
    assert not replace(everyone, cohort=Cohort("", 0)).concerns("robot-1", ["site-7"])


def at(text: str, zone: str = "Europe/Berlin", fold: int = 0) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp()


NIGHT = Window("Europe/Berlin", "23:00", 180)


@pytest.mark.parametrize(
    ("when", "is_open", "opens"),
    [
        ("2026-11-23T22:59:59", False, "2026-11-23T23:00:00"),
        ("2026-11-23T23:00:00", True, "2026-11-23T23:00:00"),
        ("2026-11-24T01:59:59", True, "2026-11-24T01:59:59"),
        ("2026-11-24T02:00:00", False, "2026-11-24T23:00:00"),
    ],
)
def test_window_over_midnight(when: str, is_open: bool, opens: str) -> None:
    assert NIGHT.is_open(at(when)) is is_open
    assert NIGHT.next_open(at(when)) == at(opens)


@pytest.mark.parametrize(
    ("what", "least_and_most", "beyond"),
    [
        (lambda v: Window("UTC", v, 60), ("00:00", "09:59", "23:59"), ("24:00", "00:60", "0700")),
        (lambda v: Window("UTC", "01:00", v), (1, 1440), (0, 1441)),
        (lambda v: Window("UTC", "01:00", 60, v), ((), (0, 6)), ((-1,), (7,), (3, 3))),
        (lambda v: Window(v, "01:00", 60), ("x", "A/b_c+1", "z" * 64), ("", "z" * 65, "é")),
        (lambda v: Cohort(v, 5), ("", "s" * 64), ("s" * 65,)),
        (lambda v: Cohort("", v), (0, 0.5, 100), (-0.1, 100.1)),
        (lambda v: Limits(kbit_s=v), (None, 1, 10**9), (0, 10**9 + 1)),
        (lambda v: Limits(parallel=v), (1, 32), (0, 33)),
        (lambda v: Policy(retries=v), (0, 100), (-1, 101)),
        (lambda v: replace(ORDER, order=v), ("a", "z" * 64), ("", "z" * 65, "../a")),
        (lambda v: replace(ORDER, group=v), ("a", "z" * 64), ("", "z" * 65, "+", "a/b")),
        (lambda v: replace(ORDER, device=v), (None, "a", "z" * 64), ("", "z" * 65, "#")),
        (lambda v: replace(ORDER, bundle=v), ("a", "z" * 64), ("", "z" * 65, "..", "a/b")),
        (lambda v: replace(ORDER, version=v), ("1", "1.0+a_b-c"), ("", "z" * 65, ".", "-1")),
        (lambda v: replace(ORDER, release_sha256=v), ("0f" * 32,), ("0F" * 32, "0f" * 31, "")),
        (lambda v: replace(ORDER, seq=v), (1, MAX_INTEGER), (0, MAX_INTEGER + 1)),
        (lambda v: replace(ORDER, not_before=v), (0, NOW + 9), (-1, NOW + 10, math.nan)),
        (lambda v: replace(ORDER, expires=v), (NOW, 1e300), (NOW - 10, math.inf, math.nan)),
        (lambda v: OrderKey(v, "0f" * 32), ("a", "z" * 64), ("", "z" * 65, "a b")),
        (lambda v: OrderKey("a", v), ("0f" * 32,), ("0F" * 32, "0f" * 31, "")),
        (lambda v: OrderKey("a", "0f" * 32, v), ((), ("a", "z" * 64)), (("a", ""), ("a/b",))),
        (lambda v: OrderKeys(1, v, SIGNERS[:1]), (0, 2**20 - 1), (-1, 2**20)),
        (lambda v: OrderKeys(v, 0, SIGNERS[:64]), (1, 64), (0, 65)),
    ],
)  # fmt: skip
def test_what_an_order_may_ask_for_is_bounded(
    what: Callable[[Any], object], least_and_most: tuple[Any, ...], beyond: tuple[Any, ...]
) -> None:
    for value in least_and_most:
        what(value)
    for value in beyond:
        with pytest.raises(ValueError, match=re.escape(repr(value))):
            what(value)


def test_an_order_has_few_mirrors() -> None:
    mirrors = tuple(f"http://{number}.lan/" for number in range(orders.MAX_MIRRORS + 1))
    assert replace(ORDER, mirrors=mirrors[1:])
    with pytest.raises(ValueError, match="mirrors is 9; expected at most 8"):
        replace(ORDER, mirrors=mirrors)
    with pytest.raises(ValueError, match=r"mirrors is 'ftp://cache\.lan/'; expected http"):
        replace(ORDER, mirrors=("http://a.lan/", "ftp://cache.lan/"))


def test_the_same_key_twice_is_not_two_signers() -> None:
    twice = (SIGNERS[0], replace(SIGNERS[0], owner="another"))
    with pytest.raises(ValueError, match="keys is 2; expected different keys"):
        OrderKeys(2, 0, twice)
    with pytest.raises(ValueError, match="threshold is 1; expected 1 to 65 keys, at most 64"):
        OrderKeys(1, 0, SIGNERS)
    with pytest.raises(ValueError, match="threshold is 1; expected 1 to 0 keys"):
        OrderKeys(1, 0, ())


def test_no_one_is_in_a_cohort_of_nobody_and_everyone_in_the_whole() -> None:
    devices = [f"robot-{number}" for number in range(200)]
    assert not any(Cohort("412", 0).includes(device) for device in devices)
    assert all(Cohort("412", 100).includes(device) for device in devices)


def test_window_of_a_day_belongs_to_the_day_on_which_it_begins() -> None:
    sunday = replace(NIGHT, days=(6,))
    assert sunday.is_open(at("2026-11-23T01:00:00"))  # a Monday
    assert not sunday.is_open(at("2026-11-23T23:30:00"))
    assert sunday.next_open(at("2026-11-23T03:00:00")) == at("2026-11-29T23:00:00")


def test_window_opens_once_when_the_clocks_change() -> None:
    window = Window("Europe/Berlin", "02:30", 60)
    skipped = at("2027-03-28T03:30:00")  # 02:30 is not there; an hour later it is 03:30
    assert window.next_open(at("2027-03-28T01:00:00")) == skipped
    first = at("2026-10-25T02:30:00", fold=0)  # 02:30 is there twice
    assert window.next_open(at("2026-10-25T01:00:00")) == first
    assert not window.is_open(at("2026-10-25T02:30:00", fold=1))


def test_zone_that_left_the_machine_counts_as_utc() -> None:
    window = Window("Gone/Away", "12:00", 60)
    assert not window.is_known
    assert window.next_open(at("2026-11-23T00:00:00", "UTC")) == at("2026-11-23T12:00:00", "UTC")


BLOB = "cd" * 32
RELEASE = Release(
    name="assistant",
    version="2.3.0",
    seq=17,
    manifest=FileRef("manifest.json", 900, "ab" * 32),
    files=(
        FileRef("report.json", 10, "ef" * 32),
        FileRef("weights-00001-of-00001.safetensors", 8192, BLOB),
    ),
    requires=Requires(("tegra234",), "6.2", 15_000, "0.1"),
    health=Health(prompts=(GoldenPrompt("2+2=", tokens=(4,)), GoldenPrompt("x", contains=("y",)))),
    config={"slots": 4},
    deltas=(DeltaRef(BLOB, "12" * 32, "34" * 32, 100),),
)


def test_release_survives_its_document() -> None:
    assert release.parse(RELEASE.to_bytes()) == RELEASE
    assert RELEASE.blobs == {"ab" * 32: 900, "ef" * 32: 10, BLOB: 8192}


RELEASES: dict[str, tuple[dict[str, Any], str]] = {
    "schema": ({"schema": 2}, "schema 2"),
    "file upwards": (
        {"files": [{"path": "../x", "size": 1, "sha256": BLOB}]},
        "'../x' is no file of a bundle",
    ),
    "file twice": ({"files": [{"path": "report.json", "size": 1, "sha256": BLOB}] * 2}, "twice"),
    "no files": ({"files": []}, "files is 0"),
    "too many prompts": (
        {"health": {**asdict(Health()), "prompts": [asdict(GoldenPrompt("a", tokens=(1,)))] * 65}},
        "prompts is 65",
    ),
    "config too large": ({"config": {"x": "y" * 20_000}}, "config has more than"),
    "name upwards": ({"name": "../up"}, "name is '../up'"),
    "version empty": ({"version": ""}, "version is ''"),
    "seq zero": ({"seq": 0}, "seq is 0"),
    "two sizes": (
        {
            "files": [
                {"path": "report.json", "size": 1, "sha256": BLOB},
                {"path": "generation.json", "size": 2, "sha256": BLOB},
            ]
        },
        "has two sizes",
    ),
    "delta of nothing": (
        {"deltas": [asdict(DeltaRef("00" * 32, BLOB, BLOB, 1))]},
        "which is no file",
    ),
    "delta too large": (
        {"deltas": [asdict(DeltaRef(BLOB, "00" * 32, "11" * 32, 8192))]},
        "no less than what it makes",
    ),
    "unknown codec": (
        {"deltas": [{**asdict(DeltaRef(BLOB, BLOB, BLOB, 1)), "codec": "pickle"}]},
        "expected one of xor+zstd",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RELEASES)
def test_release_that_cannot_be_is_refused(case: str) -> None:
    change, message = RELEASES[case]
    raw = {**json.loads(RELEASE.to_bytes()), **change}
    with pytest.raises(UpdateRefused, match="release") as caught:
        release.parse(json.dumps(raw).encode())
    assert message in str(caught.value)
    assert caught.value.reason == "malformed"


def test_requirements_say_what_is_missing() -> None:
    needs = RELEASE.requires
    assert needs.unmet(chip="tegra234", jetpack="6.10", memory_mb=15_500, agent="0.1.0") == ()
    assert Requires().unmet(chip=None, jetpack=None, memory_mb=None, agent="0.1") == ()
    assert needs.unmet(chip="tegra194", jetpack="6.1", memory_mb=7000, agent="0.0.9") == (
        "needs tegra234, this device is tegra194",
        "needs JetPack 6.2 or later, this device has 6.1",
        "needs 15000 MB of memory, this device has 7000",
        "needs edgecascade 0.1 or later, this device has 0.0.9",
    )
    assert len(needs.unmet(chip=None, jetpack=None, memory_mb=None, agent="1")) == 3


def test_golden_prompt_asks_one_way_and_expects_something() -> None:
    with pytest.raises(ValueError, match="one of prompt, token_ids and messages"):
        GoldenPrompt("a", token_ids=(1,), tokens=(2,))
    with pytest.raises(ValueError, match="tokens or contains"):
        GoldenPrompt("a")


def test_health_may_leave_out_what_it_does_not_ask() -> None:
    raw = {"min_tok_s": 10, "prompts": [{"prompt": "a", "contains": ["b"]}]}
    made = strict.read(Health, raw, "health.json", defaults=True)
    assert made == Health(min_tok_s=10.0, prompts=(GoldenPrompt("a", contains=("b",)),))
    with pytest.raises(strict.BadDocument, match=r"health\.json: unknown keys \['min_toks'\]"):
        strict.read(Health, {"min_toks": 10}, "health.json", defaults=True)
    with pytest.raises(strict.BadDocument, match=r"health\.json: unknown keys \[\], missing"):
        strict.read(Health, raw, "health.json")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.sampled_from(sorted(orders.order_to_json(ORDER))), ANYTHING)
def test_any_value_in_an_order_is_read_or_refused(key: str, value: Any) -> None:
    raw = {**json.loads(json.dumps(orders.order_to_json(ORDER))), key: value}
    with suppress(strict.BadDocument):
        made = strict.read(Order, raw, "order")
        again = json.loads(json.dumps(orders.order_to_json(made)))
        assert strict.read(Order, again, "order") == made


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("http://cache.lan/", True),
        ("https://cdn.example:8443/fleet/v1/", True),
        ("http://[::1]:80/", True),
        ("ftp://cache.lan/", False),
        ("file:///etc/", False),
        ("http:///etc/", False),
        ("http://user@host/", False),
        ("http://host/?a", False),
        ("http://host/#a", False),
        ("http://host/a b", False),
        ("http://host/\n", False),
        ("http://host:99999/", False),
        ("http://host:0/", False),
        ("http://host/" + "a" * 288, True),
        ("http://host/" + "a" * 289, False),
        ("http://hößt/", False),
        ("http://[::1/", False),
    ],
)
def test_mirror_is_a_plain_web_address(url: str, good: bool) -> None:
    assert orders.is_mirror(url) is good


def test_key_is_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    key = KeyFolders([folder]).generate("root")
    assert stat.S_IMODE(os.stat(key.path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    key.path.chmod(0o640)
    with pytest.raises(FleetError, match=r"can be read by others \(mode 640\); chmod 600"):
        KeyFolders([folder]).keys("root")


def test_key_with_a_password_needs_it(tmp_path: Path) -> None:
    made = KeyFolders([tmp_path], "secret").generate("root")
    assert b"ENCRYPTED" in made.path.read_bytes()
    assert KeyFolders([tmp_path], "secret").keys("root")[0].keyid == made.keyid
    for wrong in (None, "guess"):
        with pytest.raises(FleetError, match="give its password"):
            KeyFolders([tmp_path], wrong).keys("root")


def test_keys_are_found_in_all_folders_by_their_role(tmp_path: Path) -> None:
    first, second = (KeyFolders([tmp_path / name]) for name in ("a", "b"))
    made = [first.generate("root"), first.generate("root"), second.generate("root")]
    first.generate("targets")
    (tmp_path / "a" / "root-x.pem").write_text("no key")
    found = KeyFolders([tmp_path / "a", tmp_path / "b", tmp_path / "none"]).keys("root")
    assert [key.keyid for key in found] == [key.keyid for key in made]
    assert [key.path.name for key in found] == ["root-1.pem", "root-2.pem", "root-1.pem"]


def test_damaged_key_is_named(tmp_path: Path) -> None:
    key = KeyFolders([tmp_path]).generate("root")
    key.path.write_bytes(key.path.read_bytes()[:40])
    with pytest.raises(FleetError, match=r"cannot read key .*root-1\.pem"):
        KeyFolders([tmp_path]).keys("root")
