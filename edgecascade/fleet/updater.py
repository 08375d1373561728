# SPDX-License-Identifier: Apache-2.0
"""What a device does about an order: a pure function of its state, an event and the time.

    state, effects = update(state, event, now)

    OFFERED > WAITING > DOWNLOADING > VERIFYING > STAGING > (REHEARSING) > DRAINING > PROBATION
                  the old bundle answers                              | switched | new one

The caller stores the state before it performs the effects. Each effect can be performed again; most
answer with an event. So a crash needs no code of its own: `Booted` performs what the stored phase
asks for, as the step into that phase did. docs/fleet-device.md tells what a power cut does at each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgecascade.backoff import backoff_s
from edgecascade.fleet.events import (
    Booted,
    Check,
    Checked,
    Collect,
    Defer,
    Download,
    Downloaded,
    Drain,
    Drained,
    Effect,
    Event,
    Failed,
    Halt,
    Measure,
    Measured,
    Ordered,
    RaiseFloor,
    Report,
    Soak,
    Soaked,
    Stage,
    Staged,
    Start,
    Ticked,
    Tried,
    Try,
    Verified,
    Verify,
    Wake,
)
from edgecascade.fleet.jobs import JobState
from edgecascade.fleet.orders import Order
from edgecascade.fleet.state import (
    ON_TRIAL,
    DeviceState,
    Phase,
    Slot,
    Update,
    Verdict,
    cut_evidence,
)

SWITCHING = frozenset({Phase.DRAINING, Phase.PROBATION})  # half-way is no place to stay
MAX_BOOTS = 2  # attempts of a trial; each is stored before it begins
FIRST_PAUSE_S = 30.0  # after a failed attempt; doubled for each further one
LONGEST_PAUSE_S = 3600.0

Step = tuple[DeviceState, tuple[Effect, ...]]


def update(state: DeviceState, event: Event, now: float) -> Step:
    """The state after an event, and what is to be done once that state is stored."""
    if isinstance(event, Booted):
        return _booted(state, event, now)
    if isinstance(event, Ordered):
        return _ordered(state, event, now)
    if isinstance(event, Checked):
        return _checked(state, event, now)
    current = state.update
    if current is None:
        return state, ()
    if isinstance(event, Ticked):
        return _ticked(state, current, now)
    if event.order != current.order.order:
        return state, ()  # the answer to an effect of an update that is over
    return _answered(state, current, event, now)


def _answered(state: DeviceState, current: Update, event: Event, now: float) -> Step:
    phase = current.phase
    if isinstance(event, Failed):
        return _failed(state, current, event, now)
    if isinstance(event, Measured) and phase is Phase.OFFERED:
        return _measured(state, current, event, now)
    if isinstance(event, Downloaded) and phase is Phase.DOWNLOADING:
        return _enter(state, current, Phase.VERIFYING, now)
    if isinstance(event, Verified) and phase is Phase.VERIFYING:
        if event.damaged:
            what = Failed(current.order.order, "damaged", f"blobs {', '.join(event.damaged)}")
            return _failed(state, current, what, now)
        return _enter(state, current, Phase.STAGING, now)
    if isinstance(event, Staged) and phase is Phase.STAGING:
        current = replace(current, proven=current.proven or event.known)
        if state.active is not None and event.room_for_two and not current.proven:
            return _enter(state, current, Phase.REHEARSING, now)
        return _switch_when_open(state, current, now)
    if isinstance(event, Tried) and phase in ON_TRIAL:
        if not event.ok:
            return _give_up(state, current, event.evidence, condemned=True)
        proven = replace(current, proven=True)
        if phase is Phase.REHEARSING:
            return _switch_when_open(state, proven, now)
        known = replace(state, update=proven)
        return known, (Soak(current.order.order, current.target),)
    if isinstance(event, Drained) and phase is Phase.DRAINING:
        return _activate(state, current, now)
    if isinstance(event, Soaked) and phase is Phase.PROBATION:
        if not event.ok:
            return _give_up(state, current, event.evidence, condemned=True)
        return _keep(state, current, event.evidence)
    return state, ()


def _work(state: DeviceState, now: float) -> tuple[Effect, ...]:
    """What the stored phase asks for, on entering it as after a restart."""
    current = state.update
    if current is None or (current.paused and current.phase is not Phase.PROBATION):
        return ()
    order, target = current.order, current.target
    work: dict[Phase, Effect] = {
        Phase.OFFERED: Measure(order.order, target),
        Phase.WAITING: Wake(_next_try(current, now)),
        Phase.DOWNLOADING: Download(order, target),
        Phase.VERIFYING: Verify(order.order, target),
        Phase.STAGING: Stage(order.order, target),
        Phase.REHEARSING: Try(order.order, target),
        Phase.DRAINING: Drain(order.order),
        # What is about to run is looked at first, since a power cut may have come between.
        Phase.PROBATION: Check(target),
    }
    return (work[current.phase],)


def _enter(
    state: DeviceState, current: Update, phase: Phase, now: float, not_before: float = 0.0
) -> Step:
    boots = 1 if phase in ON_TRIAL else 0
    entered = replace(current, phase=phase, boots=boots, not_before=not_before)
    after = replace(state, update=entered)
    return after, (_progress(after), *_work(after, now))


def _booted(state: DeviceState, event: Booted, now: float) -> Step:
    """Go on where the stored state says; what was to be reported may not have been."""
    current = state.update
    # An order that is being rolled back has an outcome that no longer holds.
    ended = [v for v in state.verdicts if current is None or v.order != current.order.order]
    again: tuple[Effect, ...] = (
        RaiseFloor(state.seqs, state.floors),
        *(_verdict_report(verdict) for verdict in ended),
    )
    if current is not None and current.phase in ON_TRIAL:
        if current.boots >= MAX_BOOTS:
            evidence = {
                "reason": "interrupted",
                "message": f"{current.boots} attempts did not end; {event.note}".rstrip("; "),
            }
            after, effects = _give_up(state, current, evidence, condemned=False)
            return after, (*again, *effects)
        state = replace(state, update=replace(current, boots=current.boots + 1))
    if current is None or current.phase not in SWITCHING:
        again += (Check(state.active) if state.active else Start(None),)
    if current is not None:
        again += (_progress(state),)
    elif not event.note:  # else more may be there than is known of, and worth keeping
        again += (Collect(state.slots),)
    return state, (*again, *_work(state, now))


def _ticked(state: DeviceState, current: Update, now: float) -> Step:
    before_trial = current.phase not in ON_TRIAL | SWITCHING
    if before_trial and now >= current.order.expires:
        return _cancel(state, current, "expired")
    if current.paused:
        return state, ()
    if current.phase is Phase.WAITING:
        if _next_try(current, now) <= now:
            return _enter(state, current, Phase.DOWNLOADING, now)
        return state, _work(state, now)
    if current.phase is Phase.DOWNLOADING and not _window_open(current.order, now):
        after, effects = _enter(state, current, Phase.WAITING, now)
        return after, (Halt(), *effects)
    return state, ()


def _ordered(state: DeviceState, event: Ordered, now: float) -> Step:
    order, key = event.order, event.order.key
    seen = state.seqs.get(key, -1)
    if order.seq < seen or (order.seq == seen and _other_order_had(state, order)):
        return state, ()  # a replay; answering it would overwrite what the operator knows
    current = state.update
    switching = current is not None and current.phase in SWITCHING
    other = current is not None and current.order.order != order.order
    if switching and other and order.action == "install":
        return state, (Defer(event),)
    fresh = replace(state, seqs={**state.seqs, key: order.seq})
    raise_floor = RaiseFloor(fresh.seqs, fresh.floors)
    after, effects = _obeyed(fresh, event, now)
    return after, ((raise_floor, *effects) if order.seq > seen else effects)


def _obeyed(state: DeviceState, event: Ordered, now: float) -> Step:
    order, current = event.order, state.update
    if order.action == "install":
        return _install(state, event, now)
    if order.action == "rollback":
        return _roll_back(state, order, now)
    if current is None or current.order.order != order.order:
        return state, ()
    if order.action == "pause":
        return _pause(state, current)
    if order.action == "resume":
        return _resume(state, current, order, now)
    return _cancel(state, current, "aborted")


def _other_order_had(state: DeviceState, order: Order) -> bool:
    """Whether this place in the sequence is another order's."""
    place = order.key, order.seq
    had = {verdict.order for verdict in state.verdicts if (verdict.key, verdict.seq) == place}
    current = state.update
    if current and (current.order.key, current.order.seq) == place:
        had.add(current.order.order)
    return bool(had - {order.order})


def _install(state: DeviceState, event: Ordered, now: float) -> Step:
    order, target, current = event.order, event.target, state.update
    if current is not None and current.order.order == order.order:
        return _resume(state, current, order, now)
    done = state.verdict(order.order)
    if done is not None:  # delivered again, or the rollout has become wider
        again = replace(done, seq=order.seq)
        return state.with_verdict(again), (_verdict_report(again),)
    if target is None:
        return _refuse(state, order, target, "no-release", event.refusal or "no release to install")
    if event.refusal:
        return _refuse(state, order, target, "requirements", event.refusal)
    if now >= order.expires:
        return _refuse(state, order, target, "expired", f"the order expired at {order.expires:.0f}")
    if current is None and state.active is not None and state.active.release == target.release:
        return _end(state, order, target, "SUCCEEDED", {"reason": "already-installed"})
    floor = state.floors.get(target.name, 0)
    if target.seq < floor and not order.policy.allow_downgrade:
        return _refuse(
            state, order, target, "downgrade", f"release {target.seq} is older than {floor}"
        )
    if any(verdict.condemned and verdict.release == target.release for verdict in state.verdicts):
        evidence = {
            "reason": "failed-before",
            "message": "this very release failed here; publish it again under a higher number",
        }
        return _end(state, order, target, "FAILED", evidence)
    if current is not None and current.target.release == target.release:
        after, effects = _end(state, current.order, target, "CANCELED", {"reason": "superseded"})
        adopted = replace(after, update=replace(current, order=order, paused=False))
        return adopted, (Halt(), *effects, _progress(adopted), *_work(adopted, now))
    if current is not None:
        state, before = _cancel(state, current, "superseded")
        after, effects = _install(state, event, now)
        return after, (*before, *effects)
    after = replace(state, update=Update(order, target, Phase.OFFERED))
    queued = replace(_progress(after), state="QUEUED")
    return after, (queued, *_work(after, now))


def _pause(state: DeviceState, current: Update) -> Step:
    if current.phase in SWITCHING:
        return state, (_progress(state),)
    after = replace(state, update=replace(current, paused=True))
    return after, (Halt(), _progress(after))


def _resume(state: DeviceState, current: Update, order: Order, now: float) -> Step:
    """The same order again, wider or under other limits: go on by it."""
    terms = order if order.action == "install" else current.order
    after = replace(state, update=replace(current, order=terms, paused=False))
    if terms == current.order and not current.paused:
        return after, (_progress(after),)
    restart: tuple[Effect, ...] = ()
    if current.paused or current.phase is Phase.DOWNLOADING:
        restart = (Halt(), *_work(after, now))
    return after, (_progress(after), *restart)


def _roll_back(state: DeviceState, order: Order, now: float) -> Step:
    """Go back from what this order installed to what was there before."""
    current = state.update
    if current is not None:
        if current.order.order == order.order and current.order.action == "install":
            return _cancel(state, current, "rolled-back")
        return state, ()
    done = state.verdict(order.order)
    here = state.active is not None and done is not None and done.release == state.active.release
    if not here or done is None or done.state != "SUCCEEDED" or state.active is None:
        return state, () if done is None else (_verdict_report(done),)
    back = state.previous or state.golden
    if back is None or back == state.active:
        evidence = {"reason": "nothing-before", "message": "there is no bundle to go back to"}
        return _end(state, order, state.active, "FAILED", evidence)
    after = replace(state, update=Update(order, back, Phase.VERIFYING, proven=True))
    return after, (_progress(after), *_work(after, now))


def _measured(state: DeviceState, current: Update, event: Measured, now: float) -> Step:
    collect: tuple[Effect, ...] = ()
    if event.need_bytes > event.free_bytes:
        if event.need_bytes > event.free_bytes + event.spare_bytes:
            message = (
                f"needs {event.need_bytes} bytes, {event.free_bytes} are free and "
                f"{event.spare_bytes} could be freed"
            )
            ended = replace(state, update=None)
            return _refuse(ended, current.order, current.target, "disk-full", message)
        state = replace(state, previous=None)
        collect = (Collect(state.slots),)
    phase = Phase.DOWNLOADING if _next_try(current, now) <= now else Phase.WAITING
    after, effects = _enter(state, current, phase, now)
    return after, (*collect, *effects)


def _switch_when_open(state: DeviceState, current: Update, now: float) -> Step:
    """Interrupt the service only within the window; until then all of it stays on the disk."""
    phase = Phase.DRAINING if _window_open(current.order, now) else Phase.WAITING
    return _enter(state, current, phase, now)


def _activate(state: DeviceState, current: Update, now: float) -> Step:
    """The switch: one write of the state file names the new bundle and counts the first attempt."""
    switched = replace(state, active=current.target, previous=state.active)
    return _enter(switched, replace(current, behind=state.previous), Phase.PROBATION, now)


def _checked(state: DeviceState, event: Checked, now: float) -> Step:
    current = state.update
    on_probation = current is not None and current.phase is Phase.PROBATION
    if current is not None and on_probation and event.manifest == current.target.manifest:
        if not event.ok:
            evidence = {"reason": "damaged", "message": event.reason}
            return _give_up(state, current, evidence, condemned=False)
        order, target = current.order.order, current.target
        return state, (Soak(order, target) if current.proven else Try(order, target),)
    active = state.active
    if active is None or event.manifest != active.manifest:
        return state, ()
    if event.ok:
        return state, (Start(active),)
    return _fall_back(state, active, event.reason)


def _fall_back(state: DeviceState, damaged: Slot, reason: str) -> Step:
    """The active bundle is damaged: run another one, and let its order install it again."""
    others = (state.previous, state.golden)
    candidate = next((slot for slot in others if slot and slot.manifest != damaged.manifest), None)
    reports = tuple(
        replace(
            _verdict_report(verdict),
            state="FAILED",
            evidence={"reason": "damaged", "message": reason},
        )
        for verdict in state.verdicts
        if verdict.release == damaged.release and verdict.state == "SUCCEEDED"
    )
    forgotten = tuple(
        v for v in state.verdicts if v.release != damaged.release or v.state != "SUCCEEDED"
    )
    previous = None if candidate == state.previous else state.previous
    after = replace(state, active=candidate, previous=previous, verdicts=forgotten)
    return after, (*reports, Check(candidate) if candidate else Start(None))


def _failed(state: DeviceState, current: Update, event: Failed, now: float) -> Step:
    """Work before the trial is repeated, as often as the order allows; a trial is not."""
    evidence = {"reason": event.reason, "message": event.message}
    failures = current.failures + 1
    spent = failures > current.order.policy.retries
    if event.final or spent or current.phase in ON_TRIAL:
        return _give_up(state, current, evidence, condemned=False)
    pause_s = backoff_s(failures, FIRST_PAUSE_S, LONGEST_PAUSE_S)
    counted = replace(current, failures=failures)
    after, effects = _enter(state, counted, Phase.WAITING, now, now + pause_s)
    return after, (*effects, *_serve_again(state, current))


def _serve_again(state: DeviceState, current: Update) -> tuple[Effect, ...]:
    if current.phase is Phase.DRAINING and state.active is not None:
        return (Check(state.active),)
    return ()


def _cancel(state: DeviceState, current: Update, reason: str) -> Step:
    return _give_up(state, current, {"reason": reason}, condemned=False, outcome="CANCELED")


def _give_up(
    state: DeviceState,
    current: Update,
    evidence: Mapping[str, Any],
    *,
    condemned: bool,
    outcome: JobState = "FAILED",
) -> Step:
    """End an update on the bundle that was there before it."""
    if current.phase is Phase.PROBATION:
        state = replace(state, active=state.previous, previous=current.behind)
    ended = replace(state, update=None)
    after, report = _end(
        ended, current.order, current.target, outcome, evidence, condemned=condemned
    )
    serve = Check(after.active) if after.active else Start(None)
    return after, (Halt(), *report, serve, Collect(after.slots))


def _keep(state: DeviceState, current: Update, evidence: Mapping[str, Any]) -> Step:
    """The new bundle has proven itself: it is never gone below again, and the rest may go."""
    target = current.target
    highest = max(target.seq, state.floors.get(target.name, 0))
    kept = replace(
        state,
        update=None,
        golden=state.golden or target,
        floors={**state.floors, target.name: highest},
    )
    rolled_back = current.order.action == "rollback"
    outcome: JobState = "CANCELED" if rolled_back else "SUCCEEDED"
    reason = {"reason": "rolled-back"} if rolled_back else {}
    before = state.previous
    after, report = _end(kept, current.order, target, outcome, {**evidence, **reason}, before)
    return after, (RaiseFloor(after.seqs, after.floors), *report, Collect(after.slots))


def _refuse(
    state: DeviceState, order: Order, target: Slot | None, reason: str, message: str
) -> Step:
    return _end(state, order, target, "REJECTED", {"reason": reason, "message": message})


def _end(
    state: DeviceState,
    order: Order,
    target: Slot | None,
    outcome: JobState,
    evidence: Mapping[str, Any],
    before: Slot | None = None,
    *,
    condemned: bool = False,
) -> Step:
    verdict = Verdict(
        order=order.order,
        key=order.key,
        seq=state.seqs.get(order.key, order.seq),
        state=outcome,
        evidence=cut_evidence(evidence),
        release=target.release if target else "",
        ordered=order.release_sha256,
        condemned=condemned,
        bundle_from=_shown(before or state.active),
        bundle_to=_shown(target),
    )
    return state.with_verdict(verdict), (_verdict_report(verdict),)


def _verdict_report(verdict: Verdict) -> Report:
    return Report(
        verdict.order,
        verdict.seq,
        verdict.state,
        group=verdict.key,
        release=verdict.ordered,
        bundle_from=verdict.bundle_from,
        bundle_to=verdict.bundle_to,
        evidence=verdict.evidence,
    )


def _progress(state: DeviceState) -> Report:
    current = state.update
    assert current is not None
    before = state.previous if current.phase is Phase.PROBATION else state.active
    phase = "paused" if current.paused else current.phase.value
    order = current.order
    return Report(
        order.order,
        order.seq,
        "IN_PROGRESS",
        phase,
        order.key,
        order.release_sha256,
        _shown(before),
        _shown(current.target),
    )


def _shown(slot: Slot | None) -> str:
    return f"{slot.name} {slot.version}" if slot else ""


def _window_open(order: Order, now: float) -> bool:
    return order.window is None or order.window.is_open(now)


def _next_try(current: Update, now: float) -> float:
    """When the update may go on: now, or later."""
    at = max(now, current.not_before, current.order.not_before)
    window = current.order.window
    return at if window is None else window.next_open(at)
