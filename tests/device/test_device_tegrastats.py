# SPDX-License-Identifier: Apache-2.0
"""Lines of tegrastats in the spellings of several releases; transcriptions, not captures."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgecascade.device.tegrastats import MB, RailStats, TegraStats, parse_line

ORIN = (
    "01-08-2025 10:00:00 RAM 3170/15656MB (lfb 5x4MB) SWAP 0/7828MB (cached 0MB) "
    "CPU [9%@729,7%@729,off,off] EMC_FREQ 1%@2133 GR3D_FREQ 14%@[407,407] NVDEC off VIC 0%@115 "
    "APE 174 cpu@46.218C soc2@44.5C gpu@43.937C cv0@-256C tj@46.218C VDD_IN 5002mW/4970mW "
    "VDD_CPU_GPU_CV 839mW/800mW VDD_SOC 1439mW/1439mW\n"
)
THOR = (
    "RAM 8353/125749MB (lfb 31x4MB) CPU [90%@2601,75%@2601,off] EMC_FREQ @4266 "
    "GR3D_FREQ @[314,314,314] NVENC0_FREQ @1691 VIC off cpu@58.25C/61.75C tj@66.625C/66.625C "
    "VDD_GPU -32mW/866mW/37939mW VIN 124486mW/36487mW/124486mW FUTURE 3x"
)
OLD = (
    "RAM 2448/3964MB (lfb 2x512KB) CPU [20%@102,off] EMC_FREQ 7% GR3D_FREQ 0%@318 "
    "GPU@37.5C POM_5V_IN 1532/1532"
)


def test_orin_line_is_read_whole() -> None:
    assert parse_line(ORIN) == TegraStats(
        ram_used_bytes=3170 * MB,
        ram_total_bytes=15656 * MB,
        largest_free_block_bytes=4 * MB,
        cpu_load_percent=(9.0, 7.0, None, None),
        gpu_load_percent=14.0,
        gpu_hz=(407_000_000, 407_000_000),
        emc_load_percent=1.0,
        emc_hz=2_133_000_000,
        temps_c=(("cpu", 46.218), ("soc2", 44.5), ("gpu", 43.937), ("tj", 46.218)),
        rails=(
            RailStats("VDD_IN", 5002, 4970),
            RailStats("VDD_CPU_GPU_CV", 839, 800),
            RailStats("VDD_SOC", 1439, 1439),
        ),
    )


def test_thor_line_has_three_clusters_and_no_load() -> None:
    seen = parse_line(THOR)
    assert (seen.gpu_load_percent, seen.gpu_hz) == (None, (314_000_000,) * 3)
    assert (seen.emc_load_percent, seen.emc_hz) == (None, 4_266_000_000)
    assert seen.temps_c == (("cpu", 58.25), ("tj", 66.625))
    assert seen.rails == (RailStats("VDD_GPU", -32, 866), RailStats("VIN", 124486, 36487))


def test_old_line_has_no_units_and_small_blocks() -> None:
    seen = parse_line(OLD)
    assert seen.largest_free_block_bytes == 512 * 1024
    assert (seen.emc_load_percent, seen.emc_hz) == (7.0, None)
    assert (seen.gpu_load_percent, seen.gpu_hz) == (0.0, (318_000_000,))
    assert seen.temps_c == (("GPU", 37.5),)
    assert seen.rails == (RailStats("POM_5V_IN", 1532, 1532),)


def test_line_from_elsewhere_says_nothing() -> None:
    assert parse_line("error: tegrastats needs root") == TegraStats()
    assert parse_line("") == TegraStats()


@given(st.data())
def test_damaged_line_says_less_or_the_same(data: st.DataObject) -> None:
    """A cut between two words loses words; it changes none that are left."""
    line = data.draw(st.sampled_from([ORIN, THOR, OLD]))
    words = line.split(" ")
    cut = " ".join(words[: data.draw(st.integers(0, len(words)))])
    whole, part = parse_line(line), parse_line(cut)
    assert set(part.temps_c) <= set(whole.temps_c)
    assert set(part.rails) <= set(whole.rails)
    for name in ("ram_used_bytes", "ram_total_bytes", "gpu_load_percent", "emc_hz"):
        assert getattr(part, name) in (None, getattr(whole, name))


@given(st.text(alphabet="RAM/GCPU@[]%,.0123456789-offMBxlKEVDI_ mW\u0664\n", max_size=400))
def test_any_line_is_parsed(line: str) -> None:
    seen = parse_line(line)
    assert all(rail.name.startswith(("V", "POM_")) for rail in seen.rails)
    assert all(-55 <= temp_c <= 150 for _, temp_c in seen.temps_c)
