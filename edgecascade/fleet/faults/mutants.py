# SPDX-License-Identifier: Apache-2.0
"""F2: the update machinery without one of its safety steps. If nothing notices, nothing guards it.

A mutant is survived when the trials below see it. Those that change nothing a device could show are
listed with the reason, and must go unnoticed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from edgecascade.fleet import events, executor, state, updater
from edgecascade.fleet.executor import Executor
from edgecascade.fleet.faults import Failure, Outcome
from edgecascade.fleet.faults.crash import Cut, Scenario
from edgecascade.fleet.faults.sim import SimFile, SimFiles
from edgecascade.fleet.faults.watched import Watched
from edgecascade.fleet.faults.world import (
    Device,
    Violation,
    World,
    check_device,
    check_nothing_more,
    installed,
    last_word,
    order_for,
    publish,
    require,
)
from edgecascade.fleet.orders import Policy
from edgecascade.fleet.store import Store

TITLE = "safety steps taken away, one at a time: each must be noticed"

STATES_PER_POINT = 4
KINDS = ("good", "first")


@dataclass(frozen=True)
class Mutant:
    """A step that is left out: effects that match `skip`, or names replaced in the code."""

    name: str
    skip: str = ""
    patches: tuple[tuple[Any, str, Any], ...] = ()
    equivalent: str = ""  # why it makes no difference


def _unstored_attempt(self: Executor, event: events.Event) -> None:
    after, effects = updater.update(self.state, event, self.host.now())
    if after != self.state and isinstance(event, events.Booted):
        self.state = after
    elif after != self.state:
        self._store(after)
    for effect in effects:
        self._perform(effect)


def _effects_first(self: Executor, event: events.Event) -> None:
    after, effects = updater.update(self.state, event, self.host.now())
    before, self.state = self.state, after
    for effect in effects:
        self._perform(effect)
    if after != before:
        self._store(self.state)


def _forgetting(**fields: Any) -> Callable[..., updater.Step]:
    """The updater, to which a part of its state is nothing when an order comes."""
    whole = updater.update

    def update(known: state.DeviceState, event: events.Event, now: float) -> updater.Step:
        if not isinstance(event, events.Ordered):
            return whole(known, event, now)
        return whole(replace(known, **fields), event, now)

    return update


def _collecting(whole: Callable[..., updater.Step]) -> Callable[..., updater.Step]:
    def activate(known: Any, current: Any, now: float) -> updater.Step:
        after, effects = whole(known, current, now)
        return after, (events.Collect((current.target,)), *effects)

    return activate


def _never_failing(whole: Callable[..., updater.Step]) -> Callable[..., updater.Step]:
    def failed(known: Any, current: Any, event: Any, now: float) -> updater.Step:
        return whole(known, replace(current, failures=0), event, now)

    return failed


def _never_condemning(whole: Callable[..., updater.Step]) -> Callable[..., updater.Step]:
    def give_up(known: Any, current: Any, evidence: Any, **how: Any) -> updater.Step:
        return whole(known, current, evidence, **{**how, "condemned": False})

    return give_up


RELINKED = "a bundle's folder follows from its blobs, and is made again where it is looked at"
MENDED = "the floor is raised again at each start, from the state that names the same numbers"
MUTANTS = (
    Mutant("blobs are not synced", skip="sync partial/.*"),
    Mutant("names of blobs are not synced", skip="sync_folder blobs"),
    Mutant("the state is not synced", skip=r"sync state\.json\.part"),
    Mutant("the name of the state is not synced", skip="sync_folder "),
    Mutant("release documents are not synced", skip="sync releases/.*"),
    Mutant("names of release documents are not synced", skip="sync_folder releases"),
    Mutant("names in a bundle's folder are not synced", "sync_folder .*new", (), RELINKED),
    Mutant("names of bundles are not synced", "sync_folder bundles", (), RELINKED),
    Mutant("the floor is not synced", r"sync floor-.\.part", (), MENDED),
    Mutant("blobs are not verified", patches=((Store, "_damaged", lambda self, files: ()),)),
    Mutant("bundles are not looked at", patches=((Store, "check", lambda self, slot: ""),)),
    Mutant("attempts are not bounded", patches=((updater, "MAX_BOOTS", 1 << 30),)),
    Mutant("attempts are not stored", patches=((Executor, "_step", _unstored_attempt),)),
    Mutant("effects come before the state", patches=((Executor, "_step", _effects_first),)),
    Mutant("old orders are obeyed", patches=((executor, "update", _forgetting(seqs={})),)),
    Mutant("old releases are taken", patches=((executor, "update", _forgetting(floors={})),)),
    Mutant("outcomes are forgotten", patches=((executor, "update", _forgetting(verdicts=())),)),
    Mutant("the floor is not raised", patches=((executor, "raise_floor", lambda *a, **k: None),)),
    Mutant(
        "the old bundle goes before the new one is kept",
        patches=((updater, "_activate", _collecting(updater._activate)),),
    ),
    Mutant("nothing is collected", patches=((Store, "collect", lambda self, keep: None),)),
    Mutant(
        "the golden bundle is not written down apart",
        patches=((Executor, "_keep_golden", lambda self: None),),
    ),
    Mutant(
        "a release that failed is tried again",
        patches=((updater, "_give_up", _never_condemning(updater._give_up)),),
    ),
    Mutant("room is not asked for", patches=((Store, "need_bytes", lambda self, wanted: 0),)),
    Mutant(
        "failed downloads are not counted",
        patches=((updater, "_failed", _never_failing(updater._failed)),),
    ),
    Mutant(
        "checksums of small files are not compared",
        patches=((state, "unseal", lambda kind, data: data.partition(b"\n")[2]),),
    ),
)
FULL = sum(not mutant.equivalent for mutant in MUTANTS)
SHORT = 4


def run(seed: int, count: int, case: str | None = None) -> Outcome:
    """See the package."""
    chosen = list(MUTANTS)
    if count < FULL and case is None:
        chosen = random.Random(seed).sample([m for m in MUTANTS if not m.equivalent], count)
    sound = noticed(Mutant("nothing is left out"), seed)
    if sound:
        return Outcome(1, (Failure("none", f"without a mutant, {sound}"),))
    tried, failures, by = 0, [], {}
    for mutant in chosen:
        if case not in (None, mutant.name):
            continue
        seen = noticed(mutant, seed)
        by[mutant.name] = seen or f"not noticed: {mutant.equivalent}"
        if mutant.equivalent:
            if seen:
                failures.append(Failure(mutant.name, f"called equivalent, but {seen}"))
            continue
        tried += 1
        if not seen:
            failures.append(Failure(mutant.name, "nothing notices it"))
    return Outcome(tried, tuple(failures), notes={"noticed by": by})


def noticed(mutant: Mutant, seed: int) -> str:
    """What sees that a step is missing, or nothing."""
    with ExitStack() as stack:
        for target, name, replacement in mutant.patches:
            stack.enter_context(patch.object(target, name, replacement))
        skip = re.compile(mutant.skip) if mutant.skip else None
        for trial in (*TRIALS, _power_cuts):
            try:
                trial(seed, skip)
            except (Exception, Cut, Violation) as error:  # noqa: BLE001  it may break in any way
                said = str(error) if isinstance(error, Violation) else repr(error)
                return f"{trial.__name__.strip('_')}: {said:.200}"
    return ""


Skip = re.Pattern[str] | None


def _power_cuts(seed: int, skip: Skip) -> None:
    for kind in KINDS:
        scenario = Scenario.make(kind, seed)
        for left in _states(scenario, skip):
            scenario.check(left, cuts=1)


def _states(scenario: Scenario, skip: Skip) -> Iterator[SimFiles]:
    files = scenario.files.copy()
    found: list[list[SimFiles]] = []

    def before(effect: str) -> None:
        found.append(list(files.power_cuts(random.Random(len(found)), STATES_PER_POINT)))

    watched = Watched(files, before)
    watched.skip = skip
    scenario.run(watched)
    before("the end")
    for states in found:
        yield from states


@dataclass
class Site:
    """A device with its first release, and two more that are published."""

    files: SimFiles
    world: World

    @classmethod
    def make(cls, seed: int) -> Site:
        """The site of a seed."""
        rng = random.Random(seed)
        first = publish(rng, 1)
        second = publish(rng, 2, base=first)
        third = publish(rng, 3, base=second)
        world = World([first, second, third])
        files = SimFiles()
        installed(files, world, first, 1)
        return cls(files.copy(), world)

    def device(self) -> Device:
        """A process on the device."""
        return Device(self.files, self.world).boot()

    def order(self, number: int, seq: int, **changes: Any) -> events.Report | None:
        """Order a release by its number; the last word about it."""
        what = self.world.published[number - 1]
        order = order_for(what, seq, **changes)
        self.device().deliver(order, what)
        return last_word(self.world, order.order)


def _good_update(seed: int, skip: Skip) -> None:
    site = Site.make(seed)
    word = site.order(2, 2)
    require(word is not None and word.state == "SUCCEEDED", f"a good release ends as {word}")
    device = site.device()
    check_device(device)
    site.order(3, 3)
    device = site.device()
    check_device(device)
    check_nothing_more(device)


def _replay(seed: int, skip: Skip) -> None:
    site = Site.make(seed)
    site.order(2, 5)
    site.order(3, 4, name="held-back")
    active = site.device().state.active
    require(active == site.world.published[1].slot, f"an order held back installs {active}")


def _downgrade(seed: int, skip: Skip) -> None:
    site = Site.make(seed)
    site.order(2, 2)
    site.order(1, 3)
    active = site.device().state.active
    require(active == site.world.published[1].slot, f"an older release is taken: {active}")


def _bad_release(seed: int, skip: Skip) -> None:
    site, tries = Site.make(seed), 0

    def healthy(slot: state.Slot) -> bool:
        nonlocal tries
        tries += slot.seq == 2
        return slot.seq != 2

    site.world.healthy = healthy
    site.order(2, 2)
    site.order(2, 3, name="order-2")  # the rollout becomes wider
    site.order(2, 4)
    device = site.device()
    require(device.state.active == site.world.published[0].slot, "a bad release stays")
    check_device(device)
    require(tries == 1, f"a release that failed was tried {tries} times")


def _crash_loop(seed: int, skip: Skip) -> None:
    site, attempts = Site.make(seed), 0

    def crash() -> None:
        nonlocal attempts
        attempts += 1
        raise Cut

    site.world.before_trial = crash
    for _ in range(6):
        try:
            site.order(2, 2)
        except Cut:
            continue
    require(attempts <= 2, f"a release that crashes got {attempts} attempts")
    require(site.device().state.active == site.world.published[0].slot, "it does not go back")


def _rot(seed: int, skip: Skip) -> None:
    site = Site.make(seed)
    device, what = site.device(), site.world.published[1]
    damaged = min(what.release.blobs.keys() - site.world.published[0].release.blobs.keys())
    keep = device.store.adopt

    def rotten(sha256: str) -> None:
        keep(sha256)
        if sha256 == damaged:
            _flip(site.files, f"blobs/{sha256}")

    with patch.object(device.store, "adopt", rotten):
        device.deliver(order_for(what, 2, policy=Policy(retries=1)), what)
    word = last_word(site.world, "order-2")
    require(word is not None and word.evidence.get("reason") == "damaged", f"rot ends as {word}")


def _rot_at_rest(seed: int, skip: Skip) -> None:
    site = Site.make(seed)
    site.order(2, 2)
    own = (
        site.world.published[1].release.blobs.keys() - site.world.published[0].release.blobs.keys()
    )
    _flip(site.files, f"blobs/{min(own)}")
    device = site.device()
    require(device.state.active == site.world.published[0].slot, "a damaged bundle stays active")


def _lost_state(seed: int, skip: Skip) -> None:
    for path in ("state.json", "golden.json"):
        for position in range(0, 600, 23):
            site = Site.make(seed)
            _flip(site.files, path, position)
            device = site.device()
            active, first = device.state.active, site.world.published[0].slot
            require(active == first, f"with a damaged {path} it runs {active}")
    site.order(2, 1, name="old")
    require(site.device().state.active == first, "an old order is taken after the state was lost")


def _full_disk(seed: int, skip: Skip) -> None:
    site = Site.make(seed)
    site.world.fetched.clear()
    site.files.capacity_bytes = site.files.used_bytes() + 3000
    word = site.order(2, 2)
    require(not site.world.fetched, "a download began that had no room")
    require(word is not None and word.evidence.get("reason") == "disk-full", f"it ends as {word}")


def _dead_mirror(seed: int, skip: Skip) -> None:
    site = Site.make(seed)
    device = site.device()

    def dead(*unused: object) -> None:
        raise OSError("no answer")

    with patch.object(device, "download", dead):
        device.deliver(order_for(site.world.published[1], 2), site.world.published[1])
    require(device.state.update is None, "it asks a dead mirror for ever")


def _flip(files: SimFiles, path: str, position: int = 0) -> None:
    file = files._get(path)
    require(isinstance(file, SimFile), f"{path} is not there")
    if isinstance(file, SimFile):
        data = bytearray(file.seen)
        data[position % len(data)] ^= 1
        file.seen = file.durable = bytes(data)


TRIALS: tuple[Callable[[int, Skip], None], ...] = (
    _good_update,
    _replay,
    _downgrade,
    _bad_release,
    _crash_loop,
    _rot,
    _rot_at_rest,
    _lost_state,
    _full_disk,
    _dead_mirror,
)
