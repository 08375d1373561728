# SPDX-License-Identifier: Apache-2.0
"""Attacks on an operator's controller by somebody who owns the broker, and perhaps a device.

He sees every word of a device, and decides which of them the controller hears, when, how often, and
what else. Each act tries to make a rollout go on that should not, or a device look well that is
not. The rollout must stay where it is, the operator see which devices are silent or kept from news,
and what was not believed; and it must go on as soon as honest words come through.
"""

from __future__ import annotations

import json
import random
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgecascade.fleet import envelopes, reports, rollout
from edgecascade.fleet.jobs import Job
from edgecascade.fleet.keys import public_hex
from edgecascade.fleet.needs import fleet_extra
from edgecascade.fleet.orders import Cohort, Order
from edgecascade.fleet.record import Record
from edgecascade.fleet.register import Devices
from edgecascade.fleet.reports import DeviceKey
from edgecascade.fleet.rollout import Plan, Progress, Thresholds, Trouble
from edgecascade.fleet.standing import HEARTBEAT_S, SILENT_S, Standing
from edgecascade.fleet.view import MAX_STRANGERS, View
from edgecascade.service import wire
from edgecascade.service.topics import Address

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

DEVICES = 40
GROUP = "site-7"
QUARTER = 3  # the stage of 25 %
LOST_S = 900.0
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
FRESH_S = 30 * DAY_S  # what a device's metadata are good for
RELEASE = "ab" * 32
ORDER = Order("rollout", 500, GROUP, "tiny", "2.0", RELEASE, 0.0, 1e12)


def new_signer() -> CryptoSigner:
    """A key that nobody has yet."""
    with fleet_extra():
        from securesystemslib.signer import CryptoSigner
    return CryptoSigner.generate_ed25519()


@dataclass
class Desk:
    """An operator's controller in the stage of 25 %, its devices, and the broker between them."""

    rng: random.Random
    now: float = 1e6
    signers: dict[str, CryptoSigner] = field(default_factory=dict)
    latest: dict[str, Job] = field(default_factory=dict)  # what each device last signed, in truth
    boot: int = 1
    words: int = 0
    victims: dict[str, Trouble] = field(default_factory=dict)  # what an operator must see

    def __post_init__(self) -> None:
        self.signers = {f"robot-{n}": new_signer() for n in range(DEVICES)}
        self.devices = Devices().with_keys(map(self.key, self.signers), self.now)
        order = replace(ORDER, cohort=Cohort(f"{self.rng.random()}", 100))
        plan = Plan("rollout", thresholds=Thresholds(soak_s=0.0, lost_s=LOST_S))
        self.view = View(order, self.devices)
        first = min(self.view.fleet, key=lambda name: self.view.fleet[name].point)
        progress = Progress(500, QUARTER, first, since=self.now, signed_at=self.now)
        self.record = Record(order, plan, progress)
        for name in self.signers:
            self.present(name)
        for name in self.members:
            self.show(name, self.says(name, "IN_PROGRESS", phase="downloading"))
        self.show(first, self.says(first, "SUCCEEDED"))
        self.step()

    @property
    def members(self) -> list[str]:
        """The devices of the stage, the first of all stages first."""
        found = rollout.members(self.record.plan, self.record.progress, self.view.fleet)
        return sorted(found, key=lambda name: self.view.fleet[name].point)

    @property
    def others(self) -> list[str]:
        """Those of the stage that have not succeeded."""
        return [name for name in self.members if self.latest[name].state != "SUCCEEDED"]

    def key(self, name: str) -> DeviceKey:
        """As it is enrolled."""
        public = public_hex(self.signers[name].public_key)
        return DeviceKey(name, f"{name}-agent", public, (GROUP,))

    def job(self, name: str, state: Any, **more: Any) -> Job:
        """A report that is not signed, later than all before."""
        before = self.latest.get(name)
        version = before.version + 1 if before else 1
        job = Job("rollout", 500, name, state, version=version, group=GROUP, release=RELEASE)
        return replace(job, **more)

    def says(self, name: str, state: Any, **more: Any) -> bytes:
        """A device reports, truly; who owns the broker has it now."""
        self.latest[name] = self.job(name, state, **more)
        return reports.sign(self.latest[name], self.signers[name])

    def show(self, over: str, payload: bytes) -> None:
        """The broker hands the controller a report as if it came from this device's agent."""
        self.view.hear(Address("job", device=f"{over}-agent", order="rollout"), payload, self.now)

    def presence(self, name: str, word: str) -> None:
        """The broker says how a device is."""
        body = {"kind": "agent", "status": word, "device": name, "groups": [GROUP]}
        self.view.hear(Address("status", device=f"{name}-agent"), wire.encode(body), self.now)

    def stands(self, name: str, **more: Any) -> Standing:
        """How a device stands now, later than all words before; not signed."""
        self.words += 1
        plain = Standing(
            name, self.boot, number=self.words, ts=self.now, fresh_until=self.now + FRESH_S
        )
        return replace(plain, **more)

    def word(self, name: str, **more: Any) -> bytes:
        """The same in a device's own words."""
        return reports.sign(self.stands(name, **more), self.signers[name])

    def show_word(self, over: str, payload: bytes) -> None:
        """The broker hands the controller a word as if it came from this device's agent."""
        self.view.hear(Address("standing", device=f"{over}-agent"), payload, self.now)

    def present(self, name: str) -> bytes:
        """A device says that it is there, and is heard; who owns the broker keeps its word."""
        word = self.word(name)
        self.presence(name, "online")
        self.show_word(name, word)
        return word

    def heartbeats(self, seconds: float, *, but: str) -> None:
        """Time passes, and everybody is heard, except for one."""
        end = self.now + seconds
        while self.now < end:
            self.now += HEARTBEAT_S
            for name in self.signers:
                if name != but:
                    self.present(name)

    def seen_as(self, name: str) -> Trouble:
        """What the operator sees of a device."""
        return self.view.at(self.now)[name].trouble(self.now)

    def step(self, times: int = 3) -> None:
        """The controller decides."""
        for _ in range(times):
            record, fleet = self.record, self.view.at(self.now)
            after = rollout.step(record.plan, record.progress, fleet, self.now)
            self.record = record.moved(after, fleet)
            self.now += 1.0

    def restart(self) -> None:
        """The controller is killed and comes back: it has its record, and hears from the start."""
        self.view = View(self.record.order, self.devices, self.record.believed)

    def enroll(self, devices: Devices) -> None:
        """The operator's list has changed."""
        self.devices = devices
        self.view.enroll(devices)

    def honest(self) -> None:
        """The attacker is gone: everybody is heard, and who was at work succeeds."""
        known = {key.device for key in self.devices.of(GROUP)}
        for name in sorted(known & self.latest.keys()):
            done = self.latest[name].state == "SUCCEEDED"
            self.present(name)
            self.show(
                name,
                reports.sign(self.latest[name], self.signers[name])
                if done
                else self.says(name, "SUCCEEDED"),
            )


@dataclass(frozen=True)
class Trick:
    """What is done, and why the controller does not believe it; nothing where there is no lie."""

    act: Callable[[Desk], Any]
    reasons: frozenset[str]
    ends: str


TRICKS: dict[str, Trick] = {}


def trick(
    *reasons: str, ends: str = "running"
) -> Callable[[Callable[[Desk], Any]], Callable[[Desk], Any]]:
    """Enter an act under its function's name; `ends` is the rollout's state afterwards."""

    def enter(act: Callable[[Desk], Any]) -> Callable[[Desk], Any]:
        TRICKS[act.__name__.replace("_", "-")] = Trick(act, frozenset(reasons), ends)
        return act

    return enter


def tried(case: str) -> str:
    """What went wrong with one act, NAME:SEED; empty when the controller stood it."""
    one, rng = TRICKS[case.partition(":")[0]], random.Random(case)
    desk = Desk(rng)
    while len(desk.others) < 3:  # by chance, a stage of next to nobody
        desk = Desk(rng)
    one.act(desk)
    desk.step()
    progress = desk.record.progress
    if progress.stage != QUARTER:
        return f"the rollout went on to {desk.record.plan.stages[progress.stage]:g} %"
    if progress.state != one.ends:
        return f"the rollout is {progress.state} ({progress.reason}); expected {one.ends}"
    found = {reason for _, reason in desk.view.doubts.counts}
    if found != one.reasons:
        return f"not believed: {sorted(found)}; expected {sorted(one.reasons)}"
    for name, truth in desk.victims.items():
        if (shown := desk.seen_as(name)) != truth:
            return f"{name} is shown as {shown or 'well'}; it is {truth}"
    if len(desk.view.fleet) > DEVICES or len(desk.record.believed) > DEVICES:
        return f"{len(desk.view.fleet)} devices of {DEVICES}"
    if progress.state == "running":
        desk.honest()
        desk.step()
        if desk.record.progress.stage == QUARTER:
            return "afterwards honest reports do not count"
        known = {key.device for key in desk.devices.of(GROUP)}
        if hidden := [name for name in desk.victims.keys() & known if desk.seen_as(name)]:
            return f"afterwards {hidden} are not heard"
    return ""


def _forge(desk: Desk, change: Callable[[str, bytes], bytes]) -> None:
    """Something made of each device's own success report, which it never sent."""
    for name in desk.others:
        desk.show(name, change(name, reports.sign(desk.job(name, "SUCCEEDED"), new_signer())))


def _signed_by(desk: Desk, jobs: Iterable[Job]) -> None:
    for job in jobs:
        desk.show(job.device, reports.sign(job, desk.signers[job.device]))


@trick("unknown-key")
def forged_success(desk: Desk) -> None:
    """Reports of success, signed with a key of the attacker's own."""
    _forge(desk, lambda name, report: report)


@trick("unknown-key")
def unsigned_success(desk: Desk) -> None:
    """Reports of success that nobody signed."""
    _forge(desk, lambda name, report: wire.encode({**json.loads(report), "signatures": []}))


@trick("signature")
def success_under_a_known_key_id(desk: Desk) -> None:
    """A foreign signature under the name of the device's key."""

    def renamed(name: str, report: bytes) -> bytes:
        body = json.loads(report)
        body["signatures"][0]["keyid"] = desk.signers[name].public_key.keyid
        return wire.encode(body)

    _forge(desk, renamed)


@trick("malformed")
def bare_report(desk: Desk) -> None:
    """A report without an envelope, as if signatures were not needed."""
    for name in desk.others:
        desk.show(name, desk.job(name, "SUCCEEDED").to_bytes())


@trick("signature")
def failure_turned_into_success(desk: Desk) -> None:
    """A true report of failure, one word of it changed."""
    for name in desk.others:
        envelope = json.loads(desk.says(name, "FAILED"))
        job = json.loads(b64decode(envelope["payload"])) | {"state": "SUCCEEDED"}
        desk.show(name, wire.encode({**envelope, "payload": b64encode(wire.encode(job)).decode()}))


@trick("malformed")
def signature_on_something_else(desk: Desk) -> None:
    """What a device signed as another kind of document is shown as a report."""
    for name in desk.others:
        body = desk.job(name, "SUCCEEDED").to_bytes()
        desk.show(name, envelopes.seal(body, reports.ENROLMENT_TYPE, [desk.signers[name]]))


@trick("signature")
def kind_of_document_changed(desk: Desk) -> None:
    """The same, and it says that it is a report."""
    for name in desk.others:
        body = desk.job(name, "SUCCEEDED").to_bytes()
        sealed = envelopes.seal(body, reports.ENROLMENT_TYPE, [desk.signers[name]])
        desk.show(name, wire.encode({**json.loads(sealed), "payloadType": reports.REPORT_TYPE}))


@trick("other-order")
def success_with_an_earlier_order(desk: Desk) -> None:
    """Each device's true report about the rollout before this one, replayed into it."""
    _signed_by(desk, (desk.job(name, "SUCCEEDED", order="before") for name in desk.others))


@trick("other-order")
def success_with_an_order_of_the_same_name(desk: Desk) -> None:
    """The operator's records were lost, and a name is used again: the numbers tell them apart."""
    _signed_by(desk, (desk.job(name, "SUCCEEDED", seq=499) for name in desk.others))


@trick("other-order")
def success_in_another_group(desk: Desk) -> None:
    """A rollout of the same name to another group, in which these devices are too."""
    _signed_by(desk, (desk.job(name, "SUCCEEDED", group="site-8") for name in desk.others))


@trick("other-release")
def success_with_another_release(desk: Desk) -> None:
    """True reports about what an order of this name installed elsewhere."""
    _signed_by(desk, (desk.job(name, "SUCCEEDED", release="cd" * 32) for name in desk.others))


@trick()
def success_moved_to_other_devices(desk: Desk) -> None:
    """One device's true success, shown under the names of all others."""
    success = reports.sign(desk.latest[desk.members[0]], desk.signers[desk.members[0]])
    for name in desk.others:
        desk.show(name, success)


@trick("another-device")
def captured_device_speaks_for_others(desk: Desk) -> None:
    """A device is in the attacker's hands, with its key; it reports for the whole stage."""
    thief, *rest = desk.others
    desk.show(thief, desk.says(thief, "SUCCEEDED"))
    for name in rest:
        desk.show(name, reports.sign(desk.job(name, "SUCCEEDED"), desk.signers[thief]))


@trick("unknown-key")
def captured_device_signs_along(desk: Desk) -> None:
    """A forged report with two signatures, each of an enrolled device, none of its own."""
    thief, other = desk.rng.sample(desk.others, 2)
    for name in desk.others:
        body = desk.job(name, "SUCCEEDED").to_bytes()
        signers = [desk.signers[thief], desk.signers[other]]
        desk.show(name, envelopes.seal(body, reports.REPORT_TYPE, signers))


@trick("replayed", ends="paused")
def success_before_the_failure(desk: Desk) -> None:
    """A bundle that was kept turned out damaged: the success before comes once more."""
    for name in desk.others[1:]:
        desk.show(name, desk.says(name, "SUCCEEDED"))
    name = desk.others[0]
    success = desk.says(name, "SUCCEEDED")
    desk.show(name, desk.says(name, "FAILED"))
    desk.show(name, success)


@trick("replayed")
def success_before_the_failure_after_a_restart(desk: Desk) -> None:
    """The same, to a controller that was killed in between: it remembers what it believed."""
    name, *rest = desk.others
    success = desk.says(name, "SUCCEEDED")
    desk.show(name, desk.says(name, "FAILED"))
    desk.step()
    desk.restart()
    desk.show(name, success)
    for each in (desk.members[0], *rest):
        desk.show(each, desk.says(each, "SUCCEEDED"))


@trick("not-enrolled", "unknown-key")
def ghosts(desk: Desk) -> None:
    """Devices that do not exist are online and succeed: the fleet looks larger, and healthy."""
    for number in range(10 * DEVICES):
        name = f"ghost-{number}"
        desk.presence(name, "online")
        desk.show(name, reports.sign(desk.job(name, "SUCCEEDED"), new_signer()))
        desk.show_word(name, reports.sign(desk.stands(name), desk.signers[desk.members[0]]))
    assert len(desk.view.doubts.counts) <= 2 * (MAX_STRANGERS + 1), "it fills the memory"


@trick("malformed")
def enrolment_over_the_broker(desk: Desk) -> None:
    """A ghost brings its own enrolment: nobody is enrolled but by the operator's hand."""
    signer = new_signer()
    key = DeviceKey("ghost", "ghost-agent", public_hex(signer.public_key), (GROUP,))
    desk.show("ghost", reports.sign_enrolment(key, signer))


@trick("not-enrolled")
def presence_under_another_name(desk: Desk) -> None:
    """A device's agent says that it is another device, which has gone."""
    body = {"kind": "agent", "status": "offline", "device": desk.others[0], "groups": [GROUP]}
    other = desk.members[0]
    desk.view.hear(Address("status", device=f"{other}-agent"), wire.encode(body), desk.now)


@trick()
def all_but_one_are_hidden(desk: Desk) -> None:
    """One of one that can be seen has succeeded: that is not a hundred percent."""
    success = reports.sign(desk.latest[desk.members[0]], desk.signers[desk.members[0]])
    desk.restart()
    desk.show(desk.members[0], success)
    desk.presence(desk.members[0], "online")
    desk.now += 24 * HOUR_S


@trick()
def failures_are_suppressed(desk: Desk) -> None:
    """Who succeeds is heard; who fails looks as if it had gone before it began."""
    failed, *rest = desk.others
    desk.says(failed, "FAILED")
    for name in rest:
        desk.show(name, desk.says(name, "SUCCEEDED"))
    desk.presence(failed, "offline")
    desk.step()
    desk.now += 24 * HOUR_S


@trick()
def failures_are_shown_as_work(desk: Desk) -> None:
    """Who fails looks as if it were still downloading, for ever."""
    failed, *rest = desk.others
    desk.says(failed, "FAILED")
    for name in rest:
        desk.show(name, desk.says(name, "SUCCEEDED"))
    desk.now += 24 * HOUR_S
    desk.presence(failed, "online")


@trick("replayed", ends="aborted")
def device_on_trial_is_kept_alive(desk: Desk) -> None:
    """A device died on the new bundle; what it said on its way is repeated, to look alive."""
    name = desk.others[0]
    way = [desk.says(name, "IN_PROGRESS", phase="draining")]
    way.append(desk.says(name, "IN_PROGRESS", phase="probation"))
    for report in way:
        desk.show(name, report)
    for _ in range(20):
        desk.now += LOST_S / 10
        for report in way:
            desk.show(name, report)
    desk.presence(name, "online")


@trick(ends="paused")
def refusals_by_a_forged_order(desk: Desk) -> None:
    """A device is sent garbage under this order's name, and says that it refuses it."""
    for name in desk.others[1:]:
        desk.show(name, desk.says(name, "SUCCEEDED"))
    name, evidence = desk.others[0], {"reason": "signature"}
    desk.show(name, desk.says(name, "REJECTED", release="", evidence=evidence))


@trick(ends="paused")
def refusals_by_a_lying_mirror(desk: Desk) -> None:
    """A device cannot get the release that the order names, and gives up: nobody is excused."""
    for name in desk.others[1:]:
        desk.show(name, desk.says(name, "SUCCEEDED"))
    name, evidence = desk.others[0], {"reason": "no-release"}
    desk.show(name, desk.says(name, "REJECTED", evidence=evidence))


@trick(ends="paused")
def order_that_expired_on_the_way(desk: Desk) -> None:
    """A device is kept from news and from blobs until its order has expired."""
    for name in desk.others[1:]:
        desk.show(name, desk.says(name, "SUCCEEDED"))
    name, evidence = desk.others[0], {"reason": "expired"}
    desk.show(name, desk.says(name, "CANCELED", evidence=evidence))


@trick("revoked")
def revoked_device(desk: Desk) -> None:
    """A device was stolen and revoked; its key goes on reporting."""
    stolen = desk.others[0]
    desk.enroll(desk.devices.without(stolen, desk.now))
    desk.show(stolen, desk.says(stolen, "SUCCEEDED"))


@trick("revoked")
def revoked_key_of_a_device_with_a_new_one(desk: Desk) -> None:
    """It came back with a new key; the thief still has the old one."""
    name, *rest = desk.others
    stolen = desk.signers[name]
    desk.signers[name] = new_signer()
    desk.enroll(desk.devices.without(name, desk.now).with_keys([desk.key(name)], desk.now))
    for each in rest:
        desk.show(each, desk.says(each, "SUCCEEDED"))
    desk.show(name, reports.sign(desk.job(name, "SUCCEEDED"), stolen))


@trick()
def success_of_a_key_that_is_revoked_later(desk: Desk) -> None:
    """What a stolen key said before the theft was known does not count either."""
    name, *rest = desk.others
    desk.show(name, desk.says(name, "SUCCEEDED"))
    desk.signers[name] = new_signer()
    desk.enroll(desk.devices.without(name, desk.now).with_keys([desk.key(name)], desk.now))
    for each in rest:
        desk.show(each, desk.says(each, "SUCCEEDED"))
    desk.latest[name] = replace(desk.latest[name], state="FAILED")
    desk.presence(name, "offline")


@trick()
def highest_number_of_a_stolen_key(desk: Desk) -> None:
    """A thief signs the highest number there is, so that the device's new key is never believed."""
    name = desk.others[0]
    highest = desk.job(name, "IN_PROGRESS", phase="downloading", version=2**53)
    desk.show(name, reports.sign(highest, desk.signers[name]))
    desk.step()
    desk.signers[name] = new_signer()
    desk.enroll(desk.devices.without(name, desk.now).with_keys([desk.key(name)], desk.now))
    desk.restart()


@trick("unknown-key")
def device_of_another_group(desk: Desk) -> None:
    """An enrolled device that is not of this group reports in it, and is not counted."""
    signer = new_signer()
    desk.signers["guest"] = signer
    guest = DeviceKey("guest", "guest-agent", public_hex(signer.public_key), ("site-8",))
    desk.enroll(desk.devices.with_keys([guest], desk.now))
    desk.show("guest", reports.sign(desk.job("guest", "SUCCEEDED"), signer))


def _quiet(desk: Desk, seconds: float = HOUR_S) -> str:
    """A device from which nothing comes any more, while all others are heard; its name."""
    name: str = desk.rng.choice(desk.others)
    desk.heartbeats(seconds, but=name)
    desk.victims[name] = "silent"
    return name


@trick()
def standing_held_back(desk: Desk) -> None:
    """A device cannot refresh and says so: no word of it passes any more."""
    name = _quiet(desk, SILENT_S)
    desk.word(name, update_stale=True)


@trick()
def dead_device_without_a_will(desk: Desk) -> None:
    """A device died; the broker keeps its last will back, and says again that it is there."""
    last = desk.present(name := desk.rng.choice(desk.others))
    desk.heartbeats(HOUR_S, but=name)
    desk.presence(name, "online")
    desk.show_word(name, last)
    desk.victims[name] = "silent"


@trick()
def dead_device_shown_to_a_new_command(desk: Desk) -> None:
    """The same to `fleet status`, which was not there before and hears that one word only."""
    last = desk.present(name := desk.rng.choice(desk.others))
    desk.now += SILENT_S
    desk.restart()
    desk.presence(name, "online")
    desk.show_word(name, last)
    desk.victims[name] = "silent"


@trick("unknown-key")
def forged_standing(desk: Desk) -> None:
    """The attacker signs for a dead device, with a key of his own."""
    name = _quiet(desk)
    desk.show_word(name, reports.sign(desk.stands(name), new_signer()))


@trick("malformed")
def bare_standing(desk: Desk) -> None:
    """He does not sign at all, as if it were a status."""
    name = _quiet(desk)
    desk.show_word(name, desk.stands(name).to_bytes())


@trick("signature")
def standing_with_another_date(desk: Desk) -> None:
    """He changes the date of a true word."""
    old = json.loads(desk.present(name := desk.rng.choice(desk.others)))
    desk.heartbeats(HOUR_S, but=name)
    body = json.loads(b64decode(old["payload"])) | {"ts": desk.now, "number": desk.words + 1}
    desk.show_word(name, wire.encode({**old, "payload": b64encode(wire.encode(body)).decode()}))
    desk.victims[name] = "silent"


@trick("malformed")
def report_shown_as_standing(desk: Desk) -> None:
    """He shows what a device signed about an order as its word on itself, and the reverse."""
    name = _quiet(desk)
    desk.show_word(name, desk.says(name, "IN_PROGRESS", phase="downloading"))
    desk.show(name, desk.word(name))


@trick("signature")
def report_renamed_to_standing(desk: Desk) -> None:
    """The same, and he changes what kind of document it says it is."""
    name = _quiet(desk)
    sealed = envelopes.seal(desk.stands(name).to_bytes(), reports.REPORT_TYPE, [desk.signers[name]])
    desk.show_word(name, wire.encode({**json.loads(sealed), "payloadType": reports.STANDING_TYPE}))


@trick("replayed")
def standing_before_it_was_stale(desk: Desk) -> None:
    """A device says that its metadata have expired: he repeats what it said before."""
    well = desk.present(name := desk.rng.choice(desk.others))
    desk.now += HEARTBEAT_S
    desk.show_word(name, desk.word(name, update_stale=True))
    desk.show_word(name, well)
    desk.victims[name] = "stale"


@trick("replayed")
def standing_of_an_earlier_start(desk: Desk) -> None:
    """The device was started anew since: the number is higher, but of the start before."""
    well = desk.word(name := desk.rng.choice(desk.others), number=9999)
    desk.show_word(name, well)
    desk.boot = 2
    desk.show_word(name, desk.word(name, update_stale=True))
    desk.show_word(name, well)
    desk.victims[name] = "stale"


@trick()
def standings_that_come_late(desk: Desk) -> None:
    """Every word passes, in order and for the first time, but later than it may."""
    name = desk.rng.choice(desk.others)
    words = [desk.word(name, ts=desk.now + at * HEARTBEAT_S) for at in range(20)]
    desk.heartbeats(SILENT_S, but=name)
    for word in words:
        desk.show_word(name, word)
        desk.heartbeats(HEARTBEAT_S, but=name)
    desk.victims[name] = "silent"


@trick()
def standing_moved_to_another_device(desk: Desk) -> None:
    """The word of a device that is well, under the name of one that is not."""
    name = _quiet(desk)
    desk.presence(name, "online")
    desk.show_word(name, desk.word(desk.members[0]))


@trick("another-device")
def captured_device_stands_for_others(desk: Desk) -> None:
    """A device in the attacker's hands says how another one stands."""
    name = _quiet(desk)
    desk.show_word(name, reports.sign(desk.stands(name), desk.signers[desk.members[0]]))


@trick("malformed")
def captured_device_says_nonsense(desk: Desk) -> None:
    """It signs dates that no calendar has, and texts where numbers belong."""
    name = _quiet(desk)
    good = json.loads(desk.stands(name).to_bytes())
    for change in ({"fresh_until": 1e300}, {"ts": -1.0}, {"number": "9"}, {"more": 1}):
        body = wire.encode(good | change)
        desk.show_word(name, envelopes.seal(body, reports.STANDING_TYPE, [desk.signers[name]]))


@trick("revoked")
def standing_of_a_revoked_key(desk: Desk) -> None:
    """A device has a new key and says with it that it is stale; the thief of the old one, well."""
    name = desk.rng.choice(desk.others)
    stolen, desk.signers[name] = desk.signers[name], new_signer()
    desk.enroll(desk.devices.without(name, desk.now).with_keys([desk.key(name)], desk.now))
    desk.show_word(name, desk.word(name, update_stale=True))
    desk.show_word(name, reports.sign(desk.stands(name), stolen))
    desk.victims[name] = "stale"


@trick()
def last_word_of_a_stolen_key(desk: Desk) -> None:
    """A thief signs the highest number there is, so that the device's new key is not heard."""
    name = desk.rng.choice(desk.others)
    desk.show_word(name, desk.word(name, boot=2**53, number=2**53))
    desk.signers[name] = new_signer()
    desk.enroll(desk.devices.without(name, desk.now).with_keys([desk.key(name)], desk.now))
    desk.victims[name] = "silent"


@trick("future")
def standing_of_the_future(desk: Desk) -> None:
    """The device's clock was put ahead for a while, and what it signed is shown for years."""
    name = desk.rng.choice(desk.others)
    words = [desk.word(name, ts=desk.now + years * 365 * DAY_S) for years in (1, 2)]
    desk.heartbeats(SILENT_S, but=name)
    for word in words:
        desk.show_word(name, word)
    desk.victims[name] = "silent"


@trick()
def standings_recorded_ahead(desk: Desk) -> None:
    """The same, each shown when its time has come: it is good until the metadata expire."""
    name, until = desk.rng.choice(desk.others), desk.now + FRESH_S
    words = [desk.word(name, ts=until - late, fresh_until=until) for late in (200.0, 100.0)]
    desk.now = until - 150.0
    desk.show_word(name, words[0])
    assert desk.seen_as(name) == "", "nobody could know"
    desk.now = until
    desk.show_word(name, words[1])
    desk.victims[name] = "stale"


@trick()
def standing_without_a_date(desk: Desk) -> None:
    """A word of when the device had no clock is shown for ever: it does not pass as a new one."""
    last = desk.word(name := desk.rng.choice(desk.others), clock_suspect=True, fresh_until=1e9)
    desk.heartbeats(HOUR_S, but=name)
    desk.show_word(name, last)
    desk.victims[name] = "undated"


@trick()
def standing_in_another_group(desk: Desk) -> None:
    """A device that is enrolled elsewhere looks like one more of this group: it is none of ours."""
    signer = new_signer()
    guest = DeviceKey("guest", "guest-agent", public_hex(signer.public_key), ("site-8",))
    desk.enroll(desk.devices.with_keys([guest], desk.now))
    desk.show_word("guest", reports.sign(desk.stands("guest"), signer))
    assert "guest" not in desk.view.fleet
