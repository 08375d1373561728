# SPDX-License-Identifier: Apache-2.0
"""Small trees of /sys, /proc and /etc as an Orin NX, an AGX Orin and a Thor show them; a clock.

The trees are transcriptions of documented layouts and values, not captures of devices: NVIDIA's
developer guide for modes, rails and zones, the kernel's hwmon and devfreq documentation for names
and units, published tegrastats and sysfs listings for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

UNREADABLE = "<a folder in the place of the file: reading it fails as a gated sensor does>"
Tree = Mapping[str, str]


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def write(root: Path, tree: Tree) -> Path:
    for name, content in tree.items():
        place(root / name, content)
    return root


def place(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if content == UNREADABLE:
        path.mkdir()
    else:
        path.write_text(content)


def ina3221(device: str, monitor: str, rails: list[tuple[str, int, int]]) -> dict[str, str]:
    """Three channels with (label, mV, mA), and the driver's seventh, the sum of the shunts."""
    folder = f"sys/bus/i2c/devices/{device}/hwmon/{monitor}"
    tree = {f"sys/bus/i2c/devices/{device}/name": "ina3221\n", f"{folder}/name": "ina3221\n"}
    for channel, (label, voltage_mv, current_ma) in enumerate(rails, 1):
        tree |= {
            f"{folder}/in{channel}_label": f"{label}\n",
            f"{folder}/in{channel}_input": f"{voltage_mv}\n",
            f"{folder}/curr{channel}_input": f"{current_ma}\n",
            f"{folder}/curr{channel}_crit": "7784\n",
            f"{folder}/curr{channel}_max": "32760\n",
            f"{folder}/curr{channel}_crit_alarm": "0\n",
            f"{folder}/curr{channel}_max_alarm": "0\n",
        }
    tree |= {f"{folder}/in7_label": "sum of shunt voltages\n", f"{folder}/in7_input": "11\n"}
    return tree


def zone(index: int, kind: str, temp: str, trips: dict[str, int]) -> dict[str, str]:
    folder = f"sys/class/thermal/thermal_zone{index}"
    tree = {f"{folder}/type": f"{kind}\n", f"{folder}/temp": temp}
    for number, (trip, temp_mc) in enumerate(trips.items()):
        tree[f"{folder}/trip_point_{number}_type"] = f"{trip}\n"
        tree[f"{folder}/trip_point_{number}_temp"] = f"{temp_mc}\n"
    return tree


def cooling(index: int, kind: str, state: int) -> dict[str, str]:
    folder = f"sys/class/thermal/cooling_device{index}"
    return {f"{folder}/type": f"{kind}\n", f"{folder}/cur_state": f"{state}\n"}


def over_current(monitor: str, counts: tuple[int, int, int]) -> dict[str, str]:
    folder = f"sys/class/hwmon/{monitor}"
    tree = {f"{folder}/name": "soctherm_oc\n"}
    for number, count in enumerate(counts, 1):
        tree[f"{folder}/oc{number}_event_cnt"] = f"{count}\n"
        tree[f"{folder}/oc{number}_throt_en"] = "1\n"
    return tree


def meminfo(total_kb: int, available_kb: int, nvmap_kb: int | None) -> dict[str, str]:
    lines = [f"MemTotal: {total_kb:>14} kB", "MemFree: 1024 kB"]
    lines += [f"MemAvailable: {available_kb:>10} kB", "HugePages_Total:       0"]
    lines += [f"NvMapMemUsed: {nvmap_kb} kB"] if nvmap_kb is not None else []
    return {"proc/meminfo": "\n".join(lines) + "\n"}


def mode(number: int, name: str, gpu_hz: int, emc_hz: int) -> str:
    return (
        f"< POWER_MODEL ID={number} NAME={name} >\nCPU_ONLINE CORE_0 1\n"
        f"CPU_A78_0 MAX_FREQ 1497600\nGPU MIN_FREQ 0\nGPU MAX_FREQ {gpu_hz}\n"
        f"EMC MAX_FREQ {emc_hz}\n\n"
    )


HEAD = "# Power models\n< PARAM TYPE=FILE NAME=GPU >\nMAX_FREQ /sys/class/devfreq/x/max_freq\n\n"
ORIN_TRIPS = {"active": 51_000, "passive": 99_000, "hot": 70_000, "critical": 104_500}

ORIN_NX: Tree = {
    "proc/device-tree/model": "NVIDIA Jetson Orin NX Engineering Reference Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0000-super\0nvidia,p3767-0000\0"
    "nvidia,tegra234\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, "
    "EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n",
    **meminfo(16_032_500, 13_000_000, 900_000),
    **ina3221(
        "1-0040",
        "hwmon1",
        [("VDD_IN", 5000, 2500), ("VDD_CPU_GPU_CV", 4990, 900), ("VDD_SOC", 4980, 600)],
    ),
    **over_current("hwmon3", (0, 2, 37)),
    "sys/class/devfreq/17000000.gpu/cur_freq": "1173000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1173000000\n",
    "sys/class/devfreq/17000000.gpu/available_frequencies": "306000000 408000000 510000000 "
    "612000000 714000000 816000000 918000000 1020000000 1122000000 1173000000\n",
    "sys/class/devfreq/17000000.gpu/device/load": "876\n",
    "sys/devices/platform/gpu.0/tpc_pg_mask": "240\n",
    "sys/kernel/debug/bpmp/debug/clk/emc/rate": "3199000000\n",
    "var/lib/nvpmodel/status": "pmode:0004\n",
    "etc/nvpmodel.conf": HEAD
    + mode(0, "MAXN_SUPER", -1, -1)
    + mode(3, "25W", 408_000_000, -1)
    + mode(4, "40W", 1_173_000_000, 3_199_000_000)
    + "< PM_CONFIG DEFAULT=4 >\n",
    **zone(0, "cpu-thermal", "61250\n", ORIN_TRIPS),
    **zone(1, "gpu-thermal", "63500\n", ORIN_TRIPS),
    **zone(2, "cv0-thermal", UNREADABLE, ORIN_TRIPS),
    **zone(3, "cv1-thermal", "-256000\n", ORIN_TRIPS),
    **zone(4, "tj-thermal", "63750\n", ORIN_TRIPS),
    **cooling(0, "pwm-fan", 3),
    **cooling(1, "cpu-throttle-alert", 0),
    **cooling(2, "gpu-throttle-alert", 0),
    **cooling(3, "hot-surface-alert", 1),
    **cooling(4, "devfreq-17000000.gpu", 0),
}

AGX_ORIN: Tree = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0"
    "nvidia,tegra234\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 5.0, GCID: 1, BOARD: generic\n",
    **meminfo(64_286_720, 60_000_000, 1_200_000),
    **ina3221(
        "1-0040",
        "hwmon0",
        [("VDD_GPU_SOC", 20_000, 400), ("VDD_CPU_CV", 20_000, 100), ("VIN_SYS_5V0", 5_000, 700)],
    ),
    **ina3221(
        "1-0041",
        "hwmon1",
        [("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 20_000, 50), ("NC", 0, 0)],
    ),
    "sys/class/devfreq/17000000.ga10b/cur_freq": "612000000\n",
    "sys/class/devfreq/17000000.ga10b/max_freq": "612000000\n",
    "sys/class/devfreq/17000000.ga10b/available_frequencies": "306000000 408000000 510000000 "
    "612000000 714000000 816000000 930000000 1032000000 1134000000 1236000000 1300500000\n",
    "sys/class/devfreq/17000000.ga10b/load": "512\n",
    "sys/devices/platform/gpu.0/tpc_pg_mask": "240\n",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "etc/nvpmodel.conf": HEAD
    + mode(0, "MAXN", -1, -1)
    + mode(2, "MODE_30W", 624_000_000, -1)
    + mode(3, "MODE_50W", 828_750_000, -1),
    **zone(0, "cpu-thermal", "51250\n", ORIN_TRIPS),
    **zone(1, "gpu-thermal", "48500\n", ORIN_TRIPS),
    **zone(2, "tj-thermal", "51250\n", ORIN_TRIPS),
    **cooling(0, "gpu-throttle-alert", 0),
}

THOR_TRIPS = {"active": 60_000, "critical": 114_500}
INA238 = "sys/bus/i2c/devices/2-0044"
THOR: Tree = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3971-0089+p3834-0008\0nvidia,p3834-0008\0"
    "nvidia,tegra264\0",
    "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 2, BOARD: generic\n",
    **meminfo(128_790_528, 120_000_000, None),
    **ina3221(
        "2-0040",
        "hwmon4",
        [("VDD_GPU", 12_000, -32), ("VDD_CPU_SOC_MSS", 12_000, 900), ("VIN_SYS_5V0", 5_000, 1_500)],
    ),
    f"{INA238}/name": "ina238\n",
    f"{INA238}/hwmon/hwmon5/name": "ina238\n",
    f"{INA238}/hwmon/hwmon5/in0_input": "2\n",
    f"{INA238}/hwmon/hwmon5/in1_input": "20000\n",
    f"{INA238}/hwmon/hwmon5/curr1_input": "1445\n",
    f"{INA238}/hwmon/hwmon5/power1_input": "28900000\n",
    "sys/class/devfreq/gpu-gpc-0/cur_freq": "1575000000\n",
    "sys/class/devfreq/gpu-gpc-0/max_freq": "1575000000\n",
    "sys/class/devfreq/gpu-gpc-0/available_frequencies": "315000000 945000000 1575000000\n",
    "sys/class/devfreq/gpu-nvd-0/cur_freq": "1692000000\n",
    "sys/class/devfreq/bwmgr/cur_freq": "4266000000\n",
    "var/lib/nvpmodel/status": "pmode:0001\n",
    "etc/nvpmodel.conf": HEAD + mode(0, "MAXN", -1, -1) + mode(1, "120W", -1, -1),
    **zone(0, "cpu-thermal", "49750\n", THOR_TRIPS),
    **zone(1, "gpu-thermal", UNREADABLE, THOR_TRIPS),
    **zone(2, "soc012-thermal", "47500\n", THOR_TRIPS),
    **zone(3, "tj-thermal", "51218\n", THOR_TRIPS),
    **cooling(0, "cpufreq-cpu0", 0),
    **cooling(1, "gpu-throttle-alert", 0),
    **cooling(2, "devfreq-gpu-gpc-0", 0),
}

TREES = {"orin-nx": ORIN_NX, "agx-orin": AGX_ORIN, "thor": THOR}
