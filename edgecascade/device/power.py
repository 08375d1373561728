# SPDX-License-Identifier: Apache-2.0
"""Power rails: INA3221 (three channels, mV and mA) and INA238 (one channel, microwatts).

Which rail is the whole module depends on the board, and is told by the rails' names:

    Thor            VIN, at the input of the carrier board
    Orin NX, Nano   VDD_IN; the other rails are parts of it
    AGX Orin        no such rail: the sum of its four, below what a meter at the input shows
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path

from edgecascade.device.sysfs import ROOT, names, read_int, read_text

WHOLE_MODULE = ("VIN", "VDD_IN")
AGX_ORIN_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO")
SUM = "sum of rails"
INA3221_CHANNEL = re.compile(r"in([1-3])_label")  # in7 is the sum of the shunt voltages
MAX_MV = 100_000
MAX_MA = 100_000
MAX_UW = 1_000_000_000
# A driver that is bound again gets another hwmon number. Looking costs about as much as one read.
RESCAN_S = 5.0


@dataclass(frozen=True)
class Rail:
    """One rail as it reads now. A gated GPU's rail reads slightly below zero."""

    name: str
    power_mw: float | None = None
    voltage_mv: int | None = None
    current_ma: int | None = None
    # Alarms latch in the sensor until they are read: each read tells of the time since the last.
    crit_alarm: bool | None = None
    max_alarm: bool | None = None


@dataclass(frozen=True)
class Power:
    """All rails, and the draw of the whole module where the rails tell it."""

    rails: tuple[Rail, ...] = ()
    total_mw: float | None = None
    total_rail: str | None = None  # VIN, VDD_IN or "sum of rails"


@dataclass(frozen=True)
class Sensor:
    """The files of one channel of a power monitor."""

    name: str
    folder: Path
    channel: int
    has_power: bool  # INA238 multiplies by itself

    def power_mw(self) -> float | None:
        """Milliwatts now."""
        if self.has_power:
            power_uw = read_int(self.folder / f"power{self.channel}_input", -MAX_UW, MAX_UW)
            if power_uw is not None:
                return power_uw / 1000
        return _product_mw(self.voltage_mv(), self.current_ma())

    def voltage_mv(self) -> int | None:
        """Millivolts now."""
        return read_int(self.folder / f"in{self.channel}_input", 0, MAX_MV)

    def current_ma(self) -> int | None:
        """Milliamperes now."""
        return read_int(self.folder / f"curr{self.channel}_input", -MAX_MA, MAX_MA)

    def alarm(self, kind: str) -> bool | None:
        """Whether the current has passed its `crit` or `max` limit since the last read."""
        state = read_int(self.folder / f"curr{self.channel}_{kind}_alarm", 0, 1)
        return None if state is None else state == 1

    def read(self, *, alarms: bool) -> Rail:
        """Everything about the rail; who looks at its alarms takes them from all others."""
        voltage_mv, current_ma = self.voltage_mv(), self.current_ma()
        power_mw = self.power_mw() if self.has_power else _product_mw(voltage_mv, current_ma)
        rail = Rail(self.name, power_mw, voltage_mv, current_ma)
        if not alarms:
            return rail
        return replace(rail, crit_alarm=self.alarm("crit"), max_alarm=self.alarm("max"))


def find_sensors(root: Path = ROOT) -> tuple[Sensor, ...]:
    """The channels that are wired, each once although sysfs shows it at several places."""
    found: dict[str, Sensor] = {}
    for folder in _monitors(root):
        chip = read_text(folder / "name") or read_text(folder / "../../name") or ""
        if chip.startswith("ina3221"):
            sensors = _ina3221(folder)
        elif chip.startswith("ina238"):
            sensors = iter([_ina238(folder)])
        else:
            continue
        for sensor in sensors:
            found.setdefault(sensor.name, sensor)
    return tuple(found.values())


class PowerReader:
    """Reads the rails again and again; looks for the files anew when they have gone."""

    def __init__(self, root: Path = ROOT, clock: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._clock = clock
        self._scan()

    @property
    def has_total(self) -> bool:
        """Whether the rails of this machine tell the draw of the whole module."""
        return bool(_total_names({sensor.name for sensor in self._sensors}))

    def total_mw(self) -> float | None:
        """The whole module, reading no more files than it takes. Leaves alarms latched."""
        wanted = _total_names({sensor.name for sensor in self._sensors})
        rails = (Rail(s.name, s.power_mw()) for s in self._sensors if s.name in wanted)
        total_mw = total(tuple(rails)).total_mw
        if total_mw is None:
            self._look_again()
        return total_mw

    def read(self, *, alarms: bool = True) -> Power:
        """Every rail, with its alarms or leaving them latched."""
        power = total(tuple(sensor.read(alarms=alarms) for sensor in self._sensors))
        if any(rail.power_mw is None for rail in power.rails) or not power.rails:
            self._look_again()
        return power

    def _look_again(self) -> None:
        if self._clock() - self._scanned_s >= RESCAN_S:
            self._scan()

    def _scan(self) -> None:
        self._sensors = find_sensors(self._root)
        self._scanned_s = self._clock()


def total(rails: tuple[Rail, ...]) -> Power:
    """The draw of the whole module from its rails; unknown when one of its parts is."""
    by_name = {rail.name: rail.power_mw for rail in rails}
    wanted = _total_names(by_name.keys())
    parts = [value for name in wanted if (value := by_name[name]) is not None]
    # A module that runs draws something: zero is a sensor that has not measured.
    if not wanted or len(parts) < len(wanted) or sum(parts) <= 0:
        return Power(rails)
    return Power(rails, sum(parts), wanted[0] if len(wanted) == 1 else SUM)


def _total_names(present: Set[str]) -> tuple[str, ...]:
    for name in WHOLE_MODULE:
        if name in present:
            return (name,)
    return AGX_ORIN_RAILS if present >= set(AGX_ORIN_RAILS) else ()


def _product_mw(voltage_mv: int | None, current_ma: int | None) -> float | None:
    if voltage_mv is None or current_ma is None:
        return None
    return voltage_mv * current_ma / 1000


def _monitors(root: Path) -> Iterator[Path]:
    """Folders of hwmon devices: by class, and on the I2C bus for a class that is not there."""
    classes = root / "sys/class/hwmon"
    yield from (classes / name for name in names(classes))
    bus = root / "sys/bus/i2c/devices"
    for device in names(bus):
        monitors = bus / device / "hwmon"
        yield from (monitors / name for name in names(monitors))


def _ina3221(folder: Path) -> Iterator[Sensor]:
    for name in names(folder):
        channel = INA3221_CHANNEL.fullmatch(name)
        label = read_text(folder / name) if channel else None
        if channel and label and label.upper() != "NC":
            yield Sensor(label, folder, int(channel[1]), has_power=False)


def _ina238(folder: Path) -> Sensor:
    # in0 is the shunt, in1 the bus. The driver knows no label; some kernels add one.
    label = read_text(folder / "power1_label") or read_text(folder / "in1_label")
    return Sensor(label or "VIN", folder, 1, has_power=True)
