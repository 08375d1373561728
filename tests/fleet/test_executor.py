# SPDX-License-Identifier: Apache-2.0
"""The executor between the updater and a disk, with a host that answers later."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from edgecascade.fleet import events as ev
from edgecascade.fleet.executor import REST_S, Executor, Work
from edgecascade.fleet.faults.sim import SimFiles
from edgecascade.fleet.faults.watched import Watched
from edgecascade.fleet.faults.world import (
    NOW,
    Device,
    Published,
    World,
    check_device,
    installed,
    last_word,
    order_for,
    publish,
)
from edgecascade.fleet.release import Release
from edgecascade.fleet.state import Slot


@pytest.fixture
def releases() -> list[Published]:
    rng = random.Random(3)
    first = publish(rng, 1)
    return [first, publish(rng, 2, base=first), publish(rng, 3, base=first)]


class Slow(Device):
    """A device whose long work waits until it is told to go on."""

    def __init__(self, files: SimFiles, world: World) -> None:
        super().__init__(files, world)
        self.waiting: list[Work] = []
        self.executor = Executor(files, self, store=self.store, spawn=self.waiting.append)

    def go_on(self, until: str = "") -> None:
        """Do what waits, up to the given phase."""
        while self.waiting and not self._stands_in(until):
            self.executor.post(self.waiting.pop(0)())

    def _stands_in(self, phase: str) -> bool:
        update = self.state.update
        return update is not None and update.phase.value == phase


def test_an_order_during_the_switch_is_taken_afterwards(releases: list[Published]) -> None:
    files, world = SimFiles(), World(releases)
    installed(files, world, releases[0], 1)
    device = Slow(files, world)
    device.boot()
    device.go_on()
    device.executor.offer(order_for(releases[1], 2), releases[1].document)
    device.go_on("probation")
    device.executor.offer(order_for(releases[2], 3), releases[2].document)
    device.executor.offer(order_for(releases[1], 2), releases[1].document)  # delivered again
    device.go_on()
    for number in (2, 3):
        word = last_word(world, f"order-{number}")
        assert word is not None
        assert word.state == "SUCCEEDED"
    check_device(device)
    assert device.state.active == releases[2].slot


def test_an_answer_that_comes_after_the_end_is_not_heard(releases: list[Published]) -> None:
    files, world = SimFiles(), World(releases)
    installed(files, world, releases[0], 1)
    device = Slow(files, world)
    device.boot()
    device.go_on()
    order = order_for(releases[1], 2)
    device.executor.offer(order, releases[1].document)
    device.go_on("probation")
    device.executor.post(device.waiting.pop(0)())  # it is whole
    trial = device.waiting.pop(0)
    pause = order_for(releases[1], 3, name=order.order, action="abort")
    device.executor.offer(pause)
    device.executor.post(trial())
    device.go_on()
    assert device.state.active == releases[0].slot
    word = last_word(world, order.order)
    assert word is not None
    assert word.state == "CANCELED"
    check_device(device)


def test_a_disk_that_fails_is_left_alone_for_a_while_and_then_read_anew(
    releases: list[Published],
) -> None:
    files, world = SimFiles(), World(releases)
    installed(files, world, releases[0], 1)
    watched = Watched(files)
    device = Device(watched, world).boot()

    def broken(effect: str) -> None:
        if "state.json" in effect:
            raise OSError(30, "Read-only file system")

    watched.before = broken
    device.executor.offer(order_for(releases[1], 2), releases[1].document)
    assert device.state.update is None
    assert world.running == releases[0].slot
    assert world.wake_at == NOW + REST_S
    watched.before = lambda effect: None
    device.settle()
    device.deliver(order_for(releases[1], 2), releases[1])
    assert device.state.active == releases[1].slot


def test_an_order_that_comes_as_the_disk_fails_is_taken_once_it_works(
    releases: list[Published],
) -> None:
    effects: list[str] = []
    for failing in range(1000):  # at each effect of taking it
        files, world = SimFiles(), World(releases)
        installed(files, world, releases[0], 1)
        watched = Watched(files)
        device = Slow(watched, world)
        device.boot()
        device.go_on()
        effects.clear()

        def broken(effect: str, failing: int = failing) -> None:
            effects.append(effect)
            if len(effects) > failing:
                raise OSError(28, "No space left on device")

        watched.before = broken
        device.executor.offer(order_for(releases[1], 2), releases[1].document)
        if len(effects) <= failing:
            break
        assert "No space" in device.executor.trouble
        # Who repeats an older one takes nothing away.
        device.executor.offer(order_for(releases[2], 1, name="old"), releases[2].document)
        assert device.executor.pending("order-2")
        watched.before = lambda effect: None
        device.executor.tick()
        device.go_on()
        assert device.state.active == releases[1].slot, effects
        assert not device.executor.trouble
        check_device(device)
    assert failing > 5


def test_an_order_that_waits_its_turn_as_the_disk_fails_is_taken_afterwards(
    releases: list[Published],
) -> None:
    files, world = SimFiles(), World(releases)
    installed(files, world, releases[0], 1)
    watched = Watched(files)
    device = Slow(watched, world)
    device.boot()
    device.go_on()
    device.executor.offer(order_for(releases[1], 2), releases[1].document)
    device.go_on("probation")
    device.executor.offer(order_for(releases[2], 4), releases[2].document)
    device.executor.offer(order_for(releases[0], 3, name="between"), releases[0].document)

    def broken(effect: str) -> None:
        update = device.state.update
        if update is None:  # the first is kept, and the next one begins
            raise OSError(5, "Input/output error")

    watched.before = broken
    device.go_on()
    watched.before = lambda effect: None
    device.executor.tick()
    device.go_on()
    assert device.state.active == releases[2].slot
    check_device(device)


@pytest.mark.parametrize(
    ("more", "lost", "tries"),
    [({}, False, 0), ({"min_tok_s": 9.0}, False, 1), ({}, True, 1)],
    ids=["same", "more", "lost"],
)
def test_the_active_bundle_is_tried_again_unless_the_same_was_asked_of_it(
    releases: list[Published],
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Any],
    lost: bool,
    tries: int,
) -> None:
    files, world = SimFiles(), World(releases)
    installed(files, world, releases[0], 1)
    release = publish(random.Random(3), 4, base=releases[0], config_only=True).release
    asked = replace(release, health=replace(release.health, **more))
    same = Published(asked, asked.to_bytes(), releases[0].blobs)
    world.published.append(same)
    device = Device(files, world).boot()
    tried: list[Slot] = []

    def try_out(slot: Slot, release: Release) -> tuple[bool, Mapping[str, Any]]:
        tried.append(slot)
        return not more, {"reason": "slow"} if more else {}

    monkeypatch.setattr(device, "try_out", try_out)
    if lost:
        files.remove(f"releases/{releases[0].sha256}")
    device.deliver(order_for(same, 2), same)
    assert tried == [same.slot] * tries
    assert device.state.active == (releases[0] if more else same).slot


def test_a_lost_state_is_said_and_the_golden_bundle_runs(releases: list[Published]) -> None:
    files, world = SimFiles(), World(releases)
    installed(files, world, releases[0], 1)
    Device(files, world).boot().deliver(order_for(releases[1], 2), releases[1])
    files.remove("state.json")
    device = Device(files, world).boot()
    assert device.state.active == releases[0].slot
    assert device.state.seqs == {"site": 2}
    assert files.names("bundles") == sorted(r.slot.manifest for r in releases[:2])
    device.executor.post(ev.Ticked())
    device.deliver(order_for(releases[1], 2), releases[1])
    assert device.state.active == releases[1].slot


def test_a_step_that_fails_in_a_way_nobody_foresaw_ends_the_update(
    releases: list[Published], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, world = SimFiles(), World(releases, room_for_two=True)
    installed(files, world, releases[0], 1)
    device = Device(files, world).boot()

    def hangs(slot: Slot, release: Release) -> tuple[bool, Mapping[str, Any]]:
        raise subprocess.TimeoutExpired("trial", 10)

    monkeypatch.setattr(device, "try_out", hangs)
    device.deliver(order_for(releases[1], 2), releases[1])
    word = last_word(world, "order-2")
    assert word is not None
    assert (word.state, word.evidence["reason"]) == ("FAILED", "unexpected")
    assert "TimeoutExpired" in str(word.evidence["message"])
    assert world.running == releases[0].slot


def test_a_check_that_fails_in_a_way_nobody_foresaw_is_made_again(
    releases: list[Published], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, world = SimFiles(), World(releases)
    installed(files, world, releases[0], 1)
    world.running = None
    device = Device(files, world)
    working, troubles = device.store.check, [RuntimeError("can't start new thread")]

    def check(slot: Slot) -> str:
        if troubles:
            raise troubles.pop()
        return working(slot)

    monkeypatch.setattr(device.store, "check", check)
    device.boot()
    device.settle()
    assert world.running == releases[0].slot
