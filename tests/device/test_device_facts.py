# SPDX-License-Identifier: Apache-2.0
"""Facts survive everything that can happen to a file, and absent is never zero."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Event

import pytest
from fake_device import TREES, UNREADABLE, Clock, place, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgecascade.device.facts import DeviceFacts, facts
from edgecascade.device.memory import Memory
from edgecascade.device.monitor import Cost, Monitor
from edgecascade.device.power import PowerReader

GARBAGE = st.one_of(
    st.just(""),
    st.just("\0"),
    st.just("N/A\n"),
    st.just("nan"),
    st.just("-999999999999\n"),
    st.just("9" * 400),
    st.text(alphabet="abc \n\t\0\u00e9\u0664_.-", max_size=40),
)
DAMAGE = st.one_of(st.none(), st.just(UNREADABLE), GARBAGE)
# These follow from several files, and stay known when one of them is lost.
DERIVED = {"hottest_c", "throttled", "power_mode", "over_current_events"}


def test_machine_that_is_no_jetson_has_memory_at_most(tmp_path: Path) -> None:
    assert facts(tmp_path) == DeviceFacts()
    place(tmp_path / "proc/meminfo", "MemTotal: 16 kB\nMemAvailable: 8 kB\n")
    assert facts(tmp_path) == DeviceFacts(memory=Memory(16384, 8192))
    assert facts(tmp_path).telemetry() == {"memory_available_bytes": 8192}


def test_telemetry_of_orin_nx(orin_nx: Path) -> None:
    assert facts(orin_nx).telemetry() == {
        "power_mw": 12_500.0,
        "hottest_c": 63.75,
        "gpu_load_percent": 87.6,
        "gpu_hz": 1_173_000_000,
        "emc_hz": 3_199_000_000,
        "memory_available_bytes": 13_000_000 * 1024,
        "memory_gpu_bytes": 900_000 * 1024,
        "sm_active": 8,
        "power_mode": "40W",
        "throttled": False,
        "over_current_events": 39,
    }


def test_telemetry_of_thor_leaves_out_what_thor_does_not_tell(thor: Path) -> None:
    told = facts(thor).telemetry()
    assert told["power_mw"] == 28_900.0
    assert not {"gpu_load_percent", "sm_active", "memory_gpu_bytes"} & told.keys()


def test_agx_orin_from_the_factory_runs_half_its_multiprocessors(agx_orin: Path) -> None:
    seen = facts(agx_orin)
    assert seen.mode is not None
    assert (seen.mode.name, seen.sm_active, seen.identity.sm_total) == ("MODE_30W", 8, 16)
    assert seen.throttling.active is False


def test_description_is_flat_and_whole(orin_nx: Path) -> None:
    assert facts(orin_nx).description() == {
        "model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
        "module": "Orin NX 16GB",
        "chip": "tegra234",
        "compute_capability": "8.7",
        "sm_total": 8,
        "l4t": "36.4.3",
        "jetpack": "6.2",
        "memory_total_bytes": 16_032_500 * 1024,
    }


def test_hot_orin_with_a_lowered_clock_is_throttled(orin_nx: Path) -> None:
    (orin_nx / "sys/class/thermal/thermal_zone4/temp").write_text("98500\n")
    (orin_nx / "sys/class/devfreq/17000000.gpu/cur_freq").write_text("918000000\n")
    seen = facts(orin_nx)
    assert seen.throttling.reasons == ("thermal: tj at 98.5 C, GPU at 918 of 1173 MHz",)
    assert seen.telemetry()["throttled"] is True


def test_a_look_in_passing_leaves_the_alarms_to_who_keeps_a_reader(
    orin_nx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (orin_nx / "sys/bus/i2c/devices/1-0040/hwmon/hwmon1/curr1_crit_alarm").write_text("1\n")
    real, opened = os.open, list[str]()
    monkeypatch.setattr(os, "open", lambda at, *a, **k: opened.append(str(at)) or real(at, *a, **k))
    assert facts(orin_nx).power.total_mw is not None
    assert opened
    assert not [path for path in opened if path.endswith("_alarm")]
    assert facts(orin_nx, PowerReader(orin_nx)).throttling.active


@pytest.mark.parametrize("name", sorted(TREES))
def test_reads_are_few_enough_for_telemetry(name: str, tmp_path: Path) -> None:
    """A read of sysfs takes some 10 us, one over I2C some 100: bounded in number, so in time."""
    opened = []
    root = write(tmp_path, TREES[name])
    real = os.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", lambda *a, **k: opened.append(a[0]) or real(*a, **k))
        facts(root)
    over_i2c = [path for path in opened if "hwmon" in str(path) and "oc" not in path.name]
    assert len(opened) <= 150
    assert len(over_i2c) <= 40


@pytest.mark.parametrize("name", sorted(TREES))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bad_files_cost_their_own_fields_only(
    name: str, tmp_path: Path, data: st.DataObject
) -> None:
    tree, root = TREES[name], tmp_path / name
    if not root.exists():
        write(root, tree)
    sound = facts(root).telemetry()
    victims = st.dictionaries(st.sampled_from(sorted(tree)), DAMAGE, min_size=1, max_size=12)
    damages = data.draw(victims)
    for victim, content in damages.items():
        damage(root / victim, content)
    seen = facts(root)
    for victim in damages:
        damage(root / victim, tree[victim])
    told = seen.telemetry()
    wrong = {k: v for k, v in told.items() if k not in DERIVED and v != sound.get(k)}
    assert not wrong
    assert 0 not in [v for v in told.values() if not isinstance(v, bool)]
    json.dumps([told, seen.description()], allow_nan=False)


def damage(path: Path, content: str | None) -> None:
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    if content is not None:
        place(path, content)


@pytest.mark.parametrize("name", sorted(TREES))
def test_folders_that_go_while_they_are_read_are_absent(name: str, tmp_path: Path) -> None:
    """Each read in turn is the one at which the whole of /sys, /proc and /etc disappears."""
    sound = facts(write(tmp_path / "sound", TREES[name])).telemetry()
    for last in range(1, 2 * len(TREES[name]), 7):
        root = write(tmp_path / str(last), TREES[name])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("edgecascade.device.sysfs.os.open", Vanishing(root, last))
            told = facts(root).telemetry()
        json.dumps(told, allow_nan=False)
        assert told.keys() <= sound.keys()


class Vanishing:
    """os.open, but at one of its calls the tree is already gone."""

    def __init__(self, root: Path, last: int) -> None:
        self.root = root
        self.left = last
        self.open = os.open

    def __call__(self, path: Path, flags: int) -> int:
        self.left -= 1
        if self.left == 0:
            self.root.rename(f"{self.root}-gone")
        return self.open(path, flags)


def test_request_has_its_joules_and_its_throttling(orin_nx: Path, clock: Clock) -> None:
    monitor = Monitor(orin_nx, clock)
    span = monitor.begin()
    for _ in range(4):
        clock.now_s += 0.5
        monitor.tick()
    cost = monitor.end(span)
    assert cost == Cost(25.0, False)
    assert cost.joules_per_token(50) == 0.5
    assert cost.joules_per_token(0) is None


def test_alarm_that_a_look_has_cleared_still_counts(orin_nx: Path, clock: Clock) -> None:
    alarm = orin_nx / "sys/bus/i2c/devices/1-0040/hwmon/hwmon1/curr1_crit_alarm"
    monitor = Monitor(orin_nx, clock)
    span = monitor.begin()
    alarm.write_text("1\n")
    clock.now_s += 1
    monitor.facts()
    alarm.write_text("0\n")
    clock.now_s += 1
    assert monitor.end(span).throttled is True
    assert monitor.end(monitor.begin()).throttled is False


def test_over_current_events_of_the_soc_count(orin_nx: Path, clock: Clock) -> None:
    monitor = Monitor(orin_nx, clock)
    span = monitor.begin()
    (orin_nx / "sys/class/hwmon/hwmon3/oc3_event_cnt").write_text("38\n")
    assert monitor.end(span).throttled is True


def test_monitor_has_a_thread_only_where_there_is_something_to_watch(
    orin_nx: Path, tmp_path: Path
) -> None:
    with Monitor(orin_nx) as monitor:
        assert monitor.running
    assert not monitor.running
    with Monitor(tmp_path / "nothing") as blind:
        assert not blind.running
        assert blind.end(blind.begin()) == Cost(None, None)


def test_thread_samples_by_itself(orin_nx: Path) -> None:
    enough = Event()
    looks: list[float] = []

    def clock() -> float:
        looks.append(0.0)
        if len(looks) > 10:
            enough.set()
        return 0.0

    with Monitor(orin_nx, clock, period_s=0.001):
        looks.clear()
        assert enough.wait(30)
