# SPDX-License-Identifier: Apache-2.0
"""How fast the GPU and the memory run, how much of the GPU is on, and the mode that says so.

A power mode caps clocks and switches multiprocessors off. An AGX Orin leaves the factory with half
of its multiprocessors at 612 MHz, so a speed without its mode says little.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edgecascade.device.sysfs import ROOT, names, parse_int, read_int, read_text

MAX_HZ = 20_000_000_000
# Orin under its names of JetPack 5 and 6, then Thor. gpu-nvd-0, beside it, is the video decoder.
GPU_NAMES = ("17000000.gpu", "17000000.ga10b", "gpu-gpc-0")
TPC_MASKS = (
    "sys/devices/platform/gpu.0/tpc_pg_mask",
    "sys/devices/platform/bus@0/17000000.gpu/tpc_pg_mask",
    "sys/devices/platform/17000000.gpu/tpc_pg_mask",
    "sys/devices/17000000.ga10b/tpc_pg_mask",
)
# Thor shows the memory clock to everyone, Orin only to root.
EMC_CLOCKS = ("sys/class/devfreq/bwmgr/cur_freq", "sys/kernel/debug/bpmp/debug/clk/emc/rate")
ORIN_TPCS = 8
SM_PER_TPC = 2
MODE_ID = re.compile(r"\bpmode:0*([0-9]{1,4})\b")
MODE_START = re.compile(r"<\s*POWER_MODEL\s+ID=([0-9]{1,4})\s+NAME=([^\s>]+)\s*>")
CAP = re.compile(r"(GPU|EMC)\s+MAX_FREQ\s+(-1|[0-9]{1,12})")
NO_CAP = -1


@dataclass(frozen=True)
class GpuClock:
    """The GPU's clock domain. Thor tells no load."""

    device: str
    now_hz: int | None = None
    max_hz: int | None = None  # the ceiling now: of mode, user and thermal framework together
    steps_hz: tuple[int, ...] = ()  # what the hardware offers, ascending
    load_percent: float | None = None


@dataclass(frozen=True)
class PowerMode:
    """The mode that nvpmodel has set, with its caps; None where it names none."""

    id: int
    name: str | None = None
    gpu_cap_hz: int | None = None
    emc_cap_hz: int | None = None
    gpu_uncapped: bool = False  # it says outright that the GPU may run as fast as it can


def read_gpu_clock(root: Path = ROOT) -> GpuClock | None:
    """The GPU's devfreq device, or None on a machine without one."""
    folder = root / "sys/class/devfreq"
    present = names(folder)
    device = next((name for name in GPU_NAMES if name in present), None)
    if device is None:
        return None
    gpu = folder / device
    steps = (read_text(gpu / "available_frequencies") or "").split()
    offered = {hz for step in steps if (hz := parse_int(step, 1, MAX_HZ)) is not None}
    return GpuClock(
        device,
        now_hz=read_int(gpu / "cur_freq", 0, MAX_HZ),
        max_hz=read_int(gpu / "max_freq", 1, MAX_HZ),
        steps_hz=tuple(sorted(offered)),
        load_percent=_load_percent(root, gpu),
    )


def read_emc_hz(root: Path = ROOT) -> int | None:
    """The clock of the memory controller."""
    reads = (read_int(root / path, 1, MAX_HZ) for path in EMC_CLOCKS)
    return next((hz for hz in reads if hz is not None), None)


def read_sm_active(sm_total: int | None, root: Path = ROOT) -> int | None:
    """Multiprocessors that are powered, from Orin's mask of gated TPCs; None where there is none.

    Modules that are sold with fewer start from their own number: a mask of 0 brings none back.
    """
    if sm_total is None:
        return None
    reads = (read_int(root / path, 0, (1 << ORIN_TPCS) - 1) for path in TPC_MASKS)
    mask = next((mask for mask in reads if mask is not None), None)
    if mask is None:
        return None
    return min(sm_total, SM_PER_TPC * (ORIN_TPCS - mask.bit_count()))


def read_power_mode(root: Path = ROOT) -> PowerMode | None:
    """The mode in /var/lib/nvpmodel/status, described by /etc/nvpmodel.conf."""
    status = MODE_ID.search(read_text(root / "var/lib/nvpmodel/status") or "")
    if status is None:
        return None
    wanted = int(status[1])
    name: str | None = None
    caps: dict[str, int] = {}
    inside = False
    for line in (read_text(root / "etc/nvpmodel.conf") or "").splitlines():
        start = MODE_START.match(line.strip())
        if start:
            inside = int(start[1]) == wanted
            name = start[2] if inside else name
        elif inside and (cap := CAP.fullmatch(line.strip())):
            caps[cap[1]] = int(cap[2])
    gpu, emc = caps.get("GPU"), caps.get("EMC")
    return PowerMode(
        wanted,
        name,
        gpu_cap_hz=None if gpu == NO_CAP else gpu,
        emc_cap_hz=None if emc == NO_CAP else emc,
        gpu_uncapped=gpu == NO_CAP,
    )


def _load_percent(root: Path, gpu: Path) -> float | None:
    places = (gpu / "load", gpu / "device/load", root / "sys/devices/platform/gpu.0/load")
    reads = (read_int(place, 0, 1000) for place in places)
    return next((load / 10 for load in reads if load is not None), None)
