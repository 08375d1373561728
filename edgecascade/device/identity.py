# SPDX-License-Identifier: Apache-2.0
"""Which Jetson this is, and which release it runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edgecascade.device.sysfs import ROOT, read_text


@dataclass(frozen=True)
class Module:
    """What the part number of a module tells."""

    name: str
    sm_total: int  # CUDA cores / 128: streaming multiprocessors that the module is sold with


MODULES = {
    "p3767-0000": Module("Orin NX 16GB", 8),
    "p3767-0001": Module("Orin NX 8GB", 8),
    "p3767-0003": Module("Orin Nano 8GB", 8),
    "p3767-0004": Module("Orin Nano 4GB", 4),
    "p3767-0005": Module("Orin Nano 8GB", 8),
    "p3701-0000": Module("AGX Orin 32GB", 16),
    "p3701-0004": Module("AGX Orin 32GB", 14),
    "p3701-0005": Module("AGX Orin 64GB", 16),
    "p3701-0008": Module("AGX Orin Industrial 64GB", 16),
    "p3834-0008": Module("AGX Thor T5000", 20),
}
COMPUTE_CAPABILITY = {"tegra234": "8.7", "tegra264": "11.0"}
# By the longest prefix of the L4T release that is listed.
JETPACK = {
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5.0": "6.2.2",
    "38.2": "7.0",
    "38.4": "7.1",
    "39.0": "7.2",
    "39.2": "7.2",
    "39.2.1": "7.2.1",
}
# Carrier boards stand in the same list under other families: p3768, p3737, p3971.
PART = re.compile(r"\bp(?:3767|3701|3834)-[0-9]{4}\b")
CHIP = re.compile(r"\btegra[0-9]{3}\b")
RELEASE = re.compile(r"R([0-9]{1,3}) \(release\), REVISION: ([0-9]{1,3}(?:\.[0-9]{1,3})*)")


@dataclass(frozen=True)
class Identity:
    """Everything is None on a machine that is not a Jetson."""

    model: str | None = None  # the device tree's own words
    part: str | None = None  # p3767-0000
    name: str | None = None  # Orin NX 16GB
    chip: str | None = None  # tegra234
    compute_capability: str | None = None
    sm_total: int | None = None
    l4t: str | None = None
    jetpack: str | None = None


def read_identity(root: Path = ROOT) -> Identity:
    """Part and chip from the device tree, the release from /etc/nv_tegra_release."""
    compatible = read_text(root / "proc/device-tree/compatible") or ""
    part = _match(PART, compatible)
    chip = _match(CHIP, compatible)
    module = MODULES.get(part or "")
    l4t = _l4t(read_text(root / "etc/nv_tegra_release"))
    # A PC's or a phone's device tree has a model as well; without a Tegra it is not our fact.
    model = read_text(root / "proc/device-tree/model") if part or chip or l4t else None
    return Identity(
        model=model.splitlines()[0] if model else None,
        part=part,
        name=module.name if module else None,
        chip=chip,
        compute_capability=COMPUTE_CAPABILITY.get(chip or ""),
        sm_total=module.sm_total if module else None,
        l4t=l4t,
        jetpack=jetpack_of(l4t) if l4t else None,
    )


def jetpack_of(l4t: str) -> str | None:
    """The JetPack that a release of L4T belongs to, or None for one not listed."""
    parts = l4t.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((JETPACK[prefix] for prefix in prefixes if prefix in JETPACK), None)


def _match(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.search(text)
    return found[0] if found else None


def _l4t(text: str | None) -> str | None:
    found = RELEASE.search(text or "")
    if found is None:
        return None
    revision = found[2] if "." in found[2] else f"{found[2]}.0"
    return f"{found[1]}.{revision}"
