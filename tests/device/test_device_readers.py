# SPDX-License-Identifier: Apache-2.0
"""Each reader on trees of an Orin NX, an AGX Orin and a Thor.

The trees are transcriptions of documented layouts, not captures: see fake_device.py.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fake_device import UNREADABLE, Clock, place

from edgecascade.device.clocks import (
    GpuClock,
    PowerMode,
    read_emc_hz,
    read_gpu_clock,
    read_power_mode,
    read_sm_active,
)
from edgecascade.device.identity import Identity, jetpack_of, read_identity
from edgecascade.device.memory import memory_bytes, read_memory
from edgecascade.device.power import AGX_ORIN_RAILS, SUM, PowerReader
from edgecascade.device.sysfs import parse_int, read_text
from edgecascade.device.thermal import read_cooling, read_zones
from edgecascade.device.throttling import read_over_current_events

GPU = "sys/class/devfreq/17000000.gpu"
NX_POWER = "sys/bus/i2c/devices/1-0040/hwmon/hwmon1"


def test_identity_names_module_chip_and_release(orin_nx: Path, agx_orin: Path, thor: Path) -> None:
    assert read_identity(orin_nx) == Identity(
        model="NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
        part="p3767-0000",
        name="Orin NX 16GB",
        chip="tegra234",
        compute_capability="8.7",
        sm_total=8,
        l4t="36.4.3",
        jetpack="6.2",
    )
    agx = read_identity(agx_orin)
    assert (agx.name, agx.sm_total, agx.l4t, agx.jetpack) == (
        "AGX Orin 64GB",
        16,
        "36.5.0",
        "6.2.2",
    )
    big = read_identity(thor)
    assert (big.name, big.sm_total, big.compute_capability) == ("AGX Thor T5000", 20, "11.0")
    assert (big.l4t, big.jetpack) == ("38.2.0", "7.0")


def test_unknown_part_keeps_its_number_and_no_guess(orin_nx: Path) -> None:
    (orin_nx / "proc/device-tree/compatible").write_text("nvidia,p3767-0099\0nvidia,tegra234\0")
    seen = read_identity(orin_nx)
    assert (seen.part, seen.name, seen.sm_total) == ("p3767-0099", None, None)
    assert seen.compute_capability == "8.7"


def test_device_tree_of_another_maker_is_not_a_jetson(tmp_path: Path) -> None:
    place(tmp_path / "proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    place(tmp_path / "proc/device-tree/compatible", "raspberrypi,5-model-b\0brcm,bcm2712\0")
    assert read_identity(tmp_path) == Identity()


@pytest.mark.parametrize(
    ("l4t", "jetpack"),
    [
        ("36.4.4", "6.2.1"),
        ("36.4.7", "6.2.1"),
        ("38.4.0", "7.1"),
        ("39.2.0", "7.2"),
        ("39.2.1", "7.2.1"),
        ("36.4.9", None),
        ("41.0.0", None),
    ],
)
def test_jetpack_is_told_for_listed_releases_only(l4t: str, jetpack: str | None) -> None:
    assert jetpack_of(l4t) == jetpack


def test_orin_nx_total_is_its_input_rail_alone(orin_nx: Path) -> None:
    power = PowerReader(orin_nx).read()
    assert (power.total_mw, power.total_rail) == (12_500.0, "VDD_IN")
    assert [rail.name for rail in power.rails] == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]
    assert power.rails[0].voltage_mv == 5000
    assert power.rails[0].current_ma == 2500
    assert (power.rails[0].crit_alarm, power.rails[0].max_alarm) == (False, False)


def test_agx_orin_total_is_the_sum_of_its_four_rails(agx_orin: Path) -> None:
    power = PowerReader(agx_orin).read()
    assert (power.total_mw, power.total_rail) == (8000.0 + 2000.0 + 3500.0 + 1000.0, SUM)
    assert {rail.name for rail in power.rails} == set(AGX_ORIN_RAILS)


@pytest.mark.parametrize("lost", ["in2_input", "curr2_input", "in2_label"])
def test_agx_orin_total_is_unknown_without_one_of_its_rails(agx_orin: Path, lost: str) -> None:
    os.remove(agx_orin / "sys/bus/i2c/devices/1-0041/hwmon/hwmon1" / lost)
    reader = PowerReader(agx_orin)
    assert reader.read().total_mw is None
    assert reader.total_mw() is None


def test_thor_total_is_the_ina238_in_microwatts(thor: Path) -> None:
    power = PowerReader(thor).read()
    assert (power.total_mw, power.total_rail) == (28_900.0, "VIN")
    assert {rail.name: rail.power_mw for rail in power.rails}["VDD_GPU"] == -384.0


def test_thor_total_is_unknown_without_its_input_monitor(thor: Path) -> None:
    for name in ("power1_input", "curr1_input"):
        os.remove(thor / "sys/bus/i2c/devices/2-0044/hwmon/hwmon5" / name)
    assert PowerReader(thor).read().total_mw is None


def test_ina238_without_a_power_file_is_multiplied(thor: Path) -> None:
    os.remove(thor / "sys/bus/i2c/devices/2-0044/hwmon/hwmon5/power1_input")
    assert PowerReader(thor).total_mw() == 28_900.0


def test_rail_that_reads_zero_is_no_measurement_of_a_module(orin_nx: Path) -> None:
    (orin_nx / NX_POWER / "curr1_input").write_text("0\n")
    assert PowerReader(orin_nx).total_mw() is None


def test_monitors_are_found_by_class_too_and_counted_once(orin_nx: Path) -> None:
    target = orin_nx / NX_POWER
    (orin_nx / "sys/class/hwmon/hwmon1").symlink_to(target)
    assert len(PowerReader(orin_nx).read().rails) == 3
    os.remove(orin_nx / "sys/bus/i2c/devices/1-0040/name")
    os.remove(target / "name")
    assert PowerReader(orin_nx).read().rails == ()


def test_driver_bound_again_is_found_again(orin_nx: Path, clock: Clock) -> None:
    reader = PowerReader(orin_nx, clock)
    (orin_nx / NX_POWER).rename(orin_nx / "sys/bus/i2c/devices/1-0040/hwmon/hwmon7")
    assert reader.total_mw() is None
    clock.now_s += 5.0
    assert reader.total_mw() is None  # the failed read looks for the files
    assert reader.total_mw() == 12_500.0


def test_zones_that_are_off_or_unreadable_are_absent(orin_nx: Path, thor: Path) -> None:
    assert {zone.name: zone.temp_c for zone in read_zones(orin_nx)} == {
        "cpu": 61.25,
        "gpu": 63.5,
        "tj": 63.75,
    }
    assert {zone.name for zone in read_zones(thor)} == {"cpu", "soc012", "tj"}


def test_trip_is_where_the_kernel_slows_down(orin_nx: Path, thor: Path) -> None:
    assert {zone.trip_c for zone in read_zones(orin_nx)} == {99.0}
    assert {zone.trip_c for zone in read_zones(thor)} == {114.5}


def test_fans_and_warm_cases_slow_nothing_down(orin_nx: Path) -> None:
    cooling = {device.name: device for device in read_cooling(orin_nx)}
    assert cooling["pwm-fan"].state == 3
    assert cooling["hot-surface-alert"].state == 1
    assert not any(device.slows_down for device in cooling.values())


def test_gpu_clock_and_load_of_orin(orin_nx: Path, agx_orin: Path) -> None:
    gpu = read_gpu_clock(orin_nx)
    assert gpu is not None
    assert (gpu.device, gpu.now_hz, gpu.max_hz) == ("17000000.gpu", 1_173_000_000, 1_173_000_000)
    assert (gpu.steps_hz[0], gpu.steps_hz[-1], gpu.load_percent) == (306e6, 1173e6, 87.6)
    agx = read_gpu_clock(agx_orin)
    assert agx is not None
    assert (agx.device, agx.load_percent) == ("17000000.ga10b", 51.2)


def test_thor_has_no_load_and_its_video_engine_is_not_its_gpu(thor: Path) -> None:
    assert read_gpu_clock(thor) == GpuClock(
        "gpu-gpc-0", 1_575_000_000, 1_575_000_000, (315_000_000, 945_000_000, 1_575_000_000), None
    )


def test_memory_clock_comes_from_where_it_is_shown(orin_nx: Path, thor: Path) -> None:
    assert (read_emc_hz(orin_nx), read_emc_hz(thor)) == (3_199_000_000, 4_266_000_000)


@pytest.mark.parametrize(
    ("mask", "sm_total", "active"),
    [
        ("240", 8, 8),  # NX, 40 W
        ("252", 8, 4),  # NX, 15 W
        ("240", 16, 8),  # AGX, 30 W
        ("248", 16, 6),  # AGX, 15 W
        ("0", 16, 16),
        ("0xf0", 16, 8),
        ("0", 14, 14),  # a module sold with fewer
        ("0", None, None),
        ("256", 16, None),
        ("on", 16, None),
    ],
)
def test_multiprocessors_follow_the_mask(
    tmp_path: Path, mask: str, sm_total: int | None, active: int | None
) -> None:
    place(tmp_path / "sys/devices/platform/gpu.0/tpc_pg_mask", f"{mask}\n")
    assert read_sm_active(sm_total, tmp_path) == active


def test_power_mode_has_its_name_and_caps(orin_nx: Path, thor: Path) -> None:
    assert read_power_mode(orin_nx) == PowerMode(4, "40W", 1_173_000_000, 3_199_000_000)
    assert read_power_mode(thor) == PowerMode(1, "120W", gpu_uncapped=True)
    os.remove(orin_nx / "etc/nvpmodel.conf")
    assert read_power_mode(orin_nx) == PowerMode(4)
    (orin_nx / "var/lib/nvpmodel/status").write_text("pmode:\n")
    assert read_power_mode(orin_nx) is None


def test_memory_counts_what_the_gpu_holds(orin_nx: Path, thor: Path) -> None:
    memory = read_memory(orin_nx)
    assert memory.total_bytes == 16_032_500 * 1024
    assert memory.available_bytes == 13_000_000 * 1024
    assert memory.gpu_bytes == 900_000 * 1024
    assert read_memory(thor).gpu_bytes is None
    assert memory_bytes("MemTotal", orin_nx / "proc/meminfo") == 16_032_500 * 1024
    assert memory_bytes("MemAvailable", orin_nx / "proc/none") is None


@pytest.mark.parametrize("line", ["MemAvailable:", "MemAvailable: many kB", "MemAvailable: 7"])
def test_meminfo_that_makes_no_sense_is_absent(tmp_path: Path, line: str) -> None:
    place(tmp_path / "proc/meminfo", f"{line}\nMemTotal: 8 kB\n")
    memory = read_memory(tmp_path)
    assert (memory.available_bytes, memory.total_bytes) == (None, 8192)


def test_over_current_counts_only_detectors_that_throttle(orin_nx: Path, thor: Path) -> None:
    assert read_over_current_events(orin_nx) == 39
    (orin_nx / "sys/class/hwmon/hwmon3/oc3_throt_en").write_text("0\n")
    assert read_over_current_events(orin_nx) == 2
    assert read_over_current_events(thor) is None


@pytest.mark.parametrize("name", ["oc2_event_cnt", "oc2_throt_en"])
def test_over_current_count_is_whole_or_unknown(orin_nx: Path, name: str) -> None:
    """A part of the sum would look like a change."""
    (orin_nx / "sys/class/hwmon/hwmon3" / name).write_text("?\n")
    assert read_over_current_events(orin_nx) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-12", -12),
        ("0x1f", 31),
        ("1_0", None),
        ("١٢", None),
        ("1.5", None),
        ("", None),
        (None, None),
        ("9" * 5000, None),
        ("101", None),
    ],
)
def test_numbers_are_plain_and_within_their_bounds(text: str | None, value: int | None) -> None:
    assert parse_int(text, -100, 100) == value


def test_text_is_none_for_all_that_cannot_be_read(tmp_path: Path) -> None:
    place(tmp_path / "folder", UNREADABLE)
    place(tmp_path / "empty", " \n")
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "empty", "pipe", "none", "empty/below", "nul\0byte"):
        assert read_text(tmp_path / name) is None
    (tmp_path / "bytes").write_bytes(b"\xff\xfe5\n")
    assert parse_int(read_text(tmp_path / "bytes"), 0, 10) is None


def test_gpu_steps_drop_what_is_not_a_number(orin_nx: Path) -> None:
    (orin_nx / GPU / "available_frequencies").write_text("408000000 fast 306000000 -1\n")
    gpu = read_gpu_clock(orin_nx)
    assert gpu is not None
    assert gpu.steps_hz == (306_000_000, 408_000_000)
