# SPDX-License-Identifier: Apache-2.0
"""F11: attacks on metadata, orders and reports by who owns the broker, the mirror and some keys.

The acts against the operator's controller are in deceit.py. Here each attack is a function that
does what the attacker does and calls the device; the device must refuse with one of the reasons
given beside it. Afterwards the floor has not sunk, nothing is being installed, no more was fetched
than is allowed, and once the attacker is gone the device takes an honest order.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from edgecascade.errors import EdgeCascadeError, FleetError
from edgecascade.fleet import orders
from edgecascade.fleet.faults import Outcome, deceit
from edgecascade.fleet.faults.siege import DAY_S, DEVICE, NAME, PLAN, Camp, Siege, run_each
from edgecascade.fleet.floor import read_floor
from edgecascade.fleet.fs import RealFiles
from edgecascade.fleet.keys import KeyFolders
from edgecascade.fleet.metadata import SignedMetadata, create
from edgecascade.fleet.orders import Cohort, Policy, Window
from edgecascade.fleet.state import DeviceState
from edgecascade.service import wire

TITLE = "attacks on metadata, orders and reports"
FULL = 324
SHORT = 29  # tests/fleet/test_attacks.py makes a test of each

MAX_FETCHED = 8 << 20  # bytes that one attempt may cost: all limits of metadata together
UNREACHABLE = "network-failed"


@dataclass(frozen=True)
class Attack:
    """What is done, and the reasons with which a device may refuse it."""

    act: Callable[[Siege], Any]
    reasons: frozenset[str]


ATTACKS: dict[str, Attack] = {}
Change = Callable[[dict[str, Any]], object]  # of an order's JSON


def attack(*reasons: str) -> Callable[[Callable[[Siege], Any]], Callable[[Siege], Any]]:
    """Enter an attack under its function's name."""

    def enter(act: Callable[[Siege], Any]) -> Callable[[Siege], Any]:
        ATTACKS[act.__name__.replace("_", "-")] = Attack(act, frozenset(reasons))
        return act

    return enter


def run(seed: int, count: int, case: str | None = None) -> Outcome:
    """Attacks on a device, then on the operator."""
    return run_each([*ATTACKS, *deceit.TRICKS], tried, "attacks", seed, count, case)


def tried(camp: Camp, case: str) -> str:
    """What went wrong with one attack; empty when device or operator stood it."""
    name, _, seed = case.partition(":")
    if name in deceit.TRICKS:
        return deceit.tried(case)
    one = ATTACKS[name]
    with camp.siege(random.Random(f"{name}:{seed}")) as siege:
        floor = siege.floor()
        reason = _outcome(siege, one)
        if reason not in one.reasons:
            return f"ended as {reason!r}; expected {' or '.join(sorted(one.reasons))}"
        if siege.mirror.bytes_given > MAX_FETCHED:
            return f"{siege.mirror.bytes_given} bytes were fetched"
        sunk = [key for key, value in siege.floor().items() if value < floor.get(key, 0)]
        if sunk:
            return f"the floor sank: {sunk}"
        if siege.device.state.update is not None and siege.device.state.update.order.order == EVIL:
            return "the device installs what the attacker wants"
        return _honest_again(siege)


EVIL = "evil"  # the id of every order that no operator wants


def _outcome(siege: Siege, one: Attack) -> str:
    try:
        one.act(siege)
    except FleetError as error:
        return error.reason
    except EdgeCascadeError as error:
        return error.code
    return "accepted"


def _honest_again(siege: Siege) -> str:
    siege.end()
    siege.publish("9.0")
    try:
        siege.device.take(siege.signed("9.0", order="honest"))
    except EdgeCascadeError as error:
        return f"afterwards an honest order is refused: {error}"
    return ""


@attack("rollback")
def old_repository(siege: Siege) -> None:
    """Rollback: everything as it was, with signatures that are still good."""
    siege.mirror.folder = siege.old
    siege.device.refresh()


@attack("rollback")
def old_repository_after_loss_of_state(siege: Siege) -> None:
    """The same, when the device has lost all that ngclient knew."""
    siege.mirror.folder = siege.old
    siege.device.lose("tuf", "belief")
    siege.device.refresh()


@attack("rollback")
def old_repository_after_loss_of_state_and_a_floor(siege: Siege) -> None:
    """The same, when one copy of the floor is damaged too."""
    siege.mirror.folder = siege.old
    siege.device.lose("tuf", "belief")
    copy = siege.device.root / siege.rng.choice(["floor-a", "floor-b"])
    data = bytearray(copy.read_bytes())
    data[siege.rng.randrange(len(data))] ^= 1 << siege.rng.randrange(8)
    copy.write_bytes(data)
    siege.device.refresh()


@attack("rollback")
def hidden_root(siege: Siege) -> None:
    """A new root is kept from a device that lost its own, with all that the old one signed."""
    before = siege.base / "before"
    shutil.copytree(siege.repository.folder, before)
    siege.repository.rotate("timestamp", siege.now)
    siege.device.refresh()
    siege.mirror.folder = before
    siege.device.lose("tuf", "belief")
    siege.device.refresh()


@attack("wrong-bytes", "rollback")
def old_snapshot_as_the_current(siege: Siege) -> None:
    """Mix and match: the old snapshot under the new one's name."""
    siege.publish("3.0")
    version = siege.current().snapshot.signed.version
    old = SignedMetadata(siege.old / "metadata").snapshot.signed.version
    siege.mirror.files[f"metadata/{version}.snapshot.json"] = (
        siege.metadata / f"{old}.snapshot.json"
    ).read_bytes()
    siege.device.refresh()


@attack("wrong-bytes", "rollback")
def old_targets_as_the_current(siege: Siege) -> None:
    """Mix and match: the old targets under the new one's name."""
    siege.publish("3.0")
    version = siege.current().targets.signed.version
    siege.mirror.files[f"metadata/{version}.targets.json"] = (
        siege.metadata / f"{version - 1}.targets.json"
    ).read_bytes()
    siege.device.refresh()


@attack("expired-metadata")
def freeze(siege: Siege) -> None:
    """Nothing new is shown any more: noticed when the timestamp expires."""
    siege.device.refresh()
    siege.pass_time(siege.rng.uniform(1.0, 30) * DAY_S)
    if not siege.device.is_stale(siege.device.clock):
        raise FleetError("the silence is not noticed")
    siege.device.refresh()


@attack(UNREACHABLE)
def silence(siege: Siege) -> None:
    """Nothing at all is shown: noticed just as well."""
    siege.device.refresh()
    siege.mirror.down = True
    siege.pass_time(siege.rng.uniform(1.1, 30) * DAY_S)
    if not siege.device.is_stale(siege.device.clock):
        raise FleetError("the silence is not noticed")
    siege.device.refresh()


@attack("expired-metadata")
def freeze_with_the_timestamp_key(siege: Siege) -> None:
    """A stolen timestamp key keeps an old snapshot current, until the snapshot expires."""
    forged = siege.forgery()
    siege.pass_time(siege.rng.uniform(7.1, 30) * DAY_S)
    forged.write({"timestamp": siege.stolen("timestamp", 1)}, siege.now)
    siege.device.refresh()


@attack("expired-metadata")
def freeze_with_both_online_keys(siege: Siege) -> None:
    """Stolen timestamp and snapshot keys keep old targets current, until they expire."""
    forged = siege.forgery()
    siege.pass_time(siege.rng.uniform(91, 200) * DAY_S)
    online = {role: siege.stolen(role, 1) for role in ("snapshot", "timestamp")}
    forged.write(online, siege.now)
    siege.device.refresh()


@attack("expired-metadata")
def expired_root(siege: Siege) -> None:
    """All but the root is signed anew."""
    siege.pass_time(siege.rng.uniform(366, 500) * DAY_S)
    siege.current().commit(["targets", "snapshot"], siege.keys, siege.now)
    siege.device.refresh()


@attack("wrong-bytes")
def changed_release(siege: Siege) -> None:
    """One bit of the release that an order names."""
    siege.device.take(_with_release(siege, _flip))


@attack("too-long", "wrong-bytes")
def longer_release(siege: Siege) -> None:
    """A release that does not end where it was signed to end."""
    siege.device.take(_with_release(siege, lambda _, data: data * siege.rng.randint(2, 50)))


@attack("wrong-bytes")
def another_release_in_its_place(siege: Siege) -> None:
    """The old release, validly signed, where the new one should be."""
    _, old = siege.repository.release(NAME, "1.0")
    path = next(siege.repository.folder.glob(f"targets/**/{old}.release.json"))
    siege.device.take(_with_release(siege, lambda _, data: path.read_bytes()))


@attack(UNREACHABLE)
def missing_release(siege: Siege) -> None:
    """The release is not there: the device tries again later."""
    siege.device.take(_with_release(siege, lambda _, data: None))


@attack("too-long")
def endless_timestamp(siege: Siege) -> None:
    """A timestamp without an end."""
    siege.mirror.files["metadata/timestamp.json"] = lambda limit: b"{" + b" " * (limit - 1)
    siege.device.refresh()


@attack("too-long")
def endless_root(siege: Siege) -> None:
    """A next root without an end."""
    siege.mirror.files["metadata/2.root.json"] = lambda limit: b"x" * limit
    siege.device.refresh()


@attack("too-long")
def endless_metadata(siege: Siege) -> None:
    """Snapshot or targets without an end."""
    siege.publish("3.0")
    role = siege.rng.choice(["snapshot", "targets"])
    version = getattr(siege.current(), role).signed.version
    siege.mirror.files[f"metadata/{version}.{role}.json"] = lambda limit: b"x" * limit
    siege.device.refresh()


@attack("malformed", "signature", "rollback")
def unreadable_metadata(siege: Siege) -> None:
    """Metadata that are no metadata, or those of another role."""
    snapshot = siege.current().snapshot.signed.version
    siege.mirror.files["metadata/timestamp.json"] = siege.rng.choice(
        [
            b"",
            b"[]",
            b"\xff\xfe",
            b"[" * 16_000,
            b'{"signed": {}, "signatures": []}',
            b'{"signed": ' + b"9" * 9000 + b"}",
            (siege.metadata / f"{snapshot}.snapshot.json").read_bytes(),
            (siege.metadata / "1.root.json").read_bytes(),
        ]
    )
    siege.device.refresh()


@attack("wrong-bytes", UNREACHABLE, "too-long")
def stick_with_links_and_pipes(siege: Siege) -> None:
    """A USB folder whose release is a link to a file of the device, a pipe, or a folder."""
    siege.device.refresh()
    siege.forgery()
    _, sha256 = siege.repository.release(NAME, "2.0")
    path = next(siege.mirror.folder.glob(f"targets/**/{sha256}.release.json"))
    path.unlink()
    how = siege.rng.randrange(3)
    if how == 0:
        path.symlink_to(siege.device.root / "floor-a")
    elif how == 1:
        os.mkfifo(path)
    else:
        path.mkdir()
    siege.device.take(siege.signed())


@attack("signature")
def foreign_repository(siege: Siege) -> None:
    """Everything signed, with other keys."""
    other = siege.base / "foreign"
    create(other / "metadata", KeyFolders([siege.base / "thief"]), PLAN, siege.now)
    siege.mirror.folder = other
    siege.device.refresh()


@attack("signature")
def foreign_timestamp(siege: Siege) -> None:
    """A timestamp signed with a key nobody trusts."""
    siege.forgery().write({"timestamp": siege.foreign("timestamp")}, siege.now)
    siege.device.refresh()


@attack("signature")
def forged_snapshot_with_the_timestamp_key(siege: Siege) -> None:
    """A stolen timestamp key names a snapshot of the thief's own."""
    signers = {
        "timestamp": siege.stolen("timestamp", 1),
        "snapshot": siege.foreign("snapshot"),
    }
    siege.forgery().write(signers, siege.now)
    siege.device.refresh()


@attack("signature")
def forged_targets_with_both_online_keys(siege: Siege) -> None:
    """The online keys are stolen; what they name is signed by nobody."""
    _forged_targets(siege, siege.foreign("targets", 2))
    siege.device.refresh()


@attack("signature")
def forged_targets_with_one_key_of_two(siege: Siege) -> None:
    """The online keys and one key of targets are stolen; two are needed."""
    _forged_targets(siege, [*siege.stolen("targets", 1), *siege.foreign("targets")])
    siege.device.refresh()


@attack("signature", "malformed")
def one_key_signs_twice(siege: Siege) -> None:
    """The same stolen key under two names is still one key."""
    forged = siege.forgery()
    role = {name: siege.stolen(name, 1) for name in ("targets", "snapshot", "timestamp")}
    forged.write(role, siege.now)
    version = forged.targets.signed.version
    path = forged.folder / f"{version}.targets.json"
    body = json.loads(path.read_bytes())
    other = siege.rng.choice(["0" * 64, body["signatures"][0]["keyid"]])
    body["signatures"].append({**body["signatures"][0], "keyid": other})
    path.write_bytes(json.dumps(body).encode())
    forged.snapshot.signed.meta["targets.json"].length = None
    forged.snapshot.signed.meta["targets.json"].hashes = None
    forged.timestamp.signed.snapshot_meta.hashes = None
    forged.timestamp.signed.snapshot_meta.length = None
    _write_snapshot(forged, siege)
    siege.device.refresh()


@attack("signature")
def new_root_by_new_keys_only(siege: Siege) -> None:
    """Root takeover: the next root names other root keys and is signed by them."""
    _forged_root(siege, siege.foreign("root", 2))
    siege.device.refresh()


@attack("signature")
def new_root_by_one_key_of_two(siege: Siege) -> None:
    """A next root that lowers the threshold to one, signed by one."""
    _forged_root(siege, siege.stolen("root", 1), threshold=1)
    siege.device.refresh()


@attack("rollback", "malformed", "signature")
def skipped_root(siege: Siege) -> None:
    """A later root in the place of the next."""
    for role in ("timestamp", "snapshot"):
        siege.repository.rotate(role, siege.now)
    siege.mirror.files["metadata/2.root.json"] = (siege.metadata / "3.root.json").read_bytes()
    siege.device.refresh()


@attack("signature")
def revoked_timestamp_key(siege: Siege) -> None:
    """A stolen key goes on signing after it was taken away."""
    stolen = siege.stolen("timestamp", 1)
    siege.repository.rotate("timestamp", siege.now)
    siege.device.refresh()
    siege.forgery().write({"timestamp": stolen}, siege.now)
    siege.device.refresh()


@attack("signature")
def revoked_root_key(siege: Siege) -> None:
    """Two root keys are stolen; one is replaced before they are used."""
    stolen = siege.stolen("root", 2)
    siege.repository.rotate("root", siege.now, lost=[stolen[0].keyid])
    siege.device.refresh()
    _forged_root(siege, stolen)
    siege.device.refresh()


@attack("rollback")
def fast_forward(siege: Siege) -> None:
    """Stolen online keys push the versions to the end; new keys in the root bring them back."""
    forged = siege.forgery()
    for role in ("timestamp", "snapshot"):
        getattr(forged, role).signed.version = 2**31
    online = {role: siege.stolen(role, 1) for role in ("timestamp", "snapshot")}
    forged.write(online, siege.now)
    siege.device.refresh()
    siege.mirror.folder = siege.repository.folder
    try:
        siege.device.refresh()
    finally:
        for role in ("timestamp", "snapshot"):
            siege.repository.rotate(role, siege.now)


@attack("too-early-is-noticed")
def dated_far_ahead(siege: Siege) -> None:
    """A stolen timestamp key claims that it is ten years later, to make all honest things old."""
    forged = siege.forgery()
    forged.timestamp.signed.unrecognized_fields["signed_at"] = int(siege.now + 3650 * DAY_S)
    forged.write({"timestamp": siege.stolen("timestamp", 1)}, siege.now)
    siege.device.refresh()
    ahead = siege.device.trust.now(siege.device.clock).time - siege.now
    if ahead > DAY_S:
        raise FleetError(f"the device believes that it is {ahead:.0f} s later")
    siege.pass_time(DAY_S)
    siege.repository.rotate("timestamp", siege.now)
    raise FleetError("bounded", reason="too-early-is-noticed")


@attack("unknown-release")
def publisher_of_another_bundle(siege: Siege) -> None:
    """Who may sign releases of one name signs one of another."""
    siege.repository.delegate("vision", siege.now)
    forged = siege.forgery()
    role, entries = "vision-publisher", forged.targets.signed.targets
    evil = entries[f"bundles/{NAME}/2.0/release.json"]
    forged.delegated[role].signed.targets[f"bundles/{NAME}/8.0/release.json"] = evil
    forged.write({r: siege.stolen(r, 1) for r in (role, "snapshot", "timestamp")}, siege.now)
    siege.device.take(siege.repository.sign_order(replace(siege.order(order=EVIL), version="8.0")))


@attack("signature")
def unsigned_order(siege: Siege) -> None:
    """An order without a signature."""
    siege.device.take(orders.sign(siege.order(order=EVIL), []))


@attack("signature")
def foreign_order(siege: Siege) -> None:
    """An order signed with a key nobody trusts."""
    key = siege.foreign("orders")[0]
    siege.device.take(orders.sign(siege.order(order=EVIL), [key.signer]))


@attack("signature")
def order_under_a_trusted_key_id(siege: Siege) -> None:
    """A foreign signature under the name of an operator's key."""
    key, real = siege.foreign("orders")[0], siege.stolen("orders", 1)[0]
    body = json.loads(orders.sign(siege.order(order=EVIL), [key.signer]))
    body["signatures"][0]["keyid"] = real.keyid
    siege.device.take(json.dumps(body).encode())


@attack("signature", "malformed")
def order_signed_with_a_key_of_another_role(siege: Siege) -> None:
    """The timestamp key, which lies on a server, signs an order."""
    key = siege.stolen("timestamp", 1)[0]
    siege.device.take(orders.sign(siege.order(order=EVIL), [key.signer]))


BEFORE: dict[str, Any] = {
    "cohort": Cohort("x", 99.99),
    "device": DEVICE,
    "action": "pause",
    "window": Window("UTC", "01:00", 60),
}
CHANGES: dict[str, Change] = {
    "chooses another bundle": lambda o: o.update(version="1.0"),
    "widens the stage": lambda o: o["cohort"].update(percent=100),
    "takes another group": lambda o: o.update(group="site-8"),
    "takes another device": lambda o: o.update(device=None),
    "lasts longer": lambda o: o.update(expires=o["expires"] + 1e6),
    "begins earlier": lambda o: o.update(not_before=0),
    "comes later": lambda o: o.update(seq=o["seq"] + 1),
    "installs where it aborts": lambda o: o.update(action="install"),
    "allows a downgrade": lambda o: o["policy"].update(allow_downgrade=True),
    "leaves the window": lambda o: o.update(window=None),
    "fetches elsewhere": lambda o: o.update(mirrors=["http://evil.example/"]),
    "pulls harder": lambda o: o["limits"].update(parallel=32),
}


@attack("signature")
def changed_order(siege: Siege) -> None:
    """One thing in a signed order is another: which bundle, when, how many, what."""
    siege.device.take(with_changed_body(siege, CHANGES[siege.rng.choice(sorted(CHANGES))]))


@attack("malformed")
def envelope_of_another_kind(siege: Siege) -> None:
    """An operator's signature on something else is shown as an order."""
    body = json.loads(siege.signed())
    body["payloadType"] = siege.rng.choice(["application/json", "", orders.PAYLOAD_TYPE + "x"])
    siege.device.take(json.dumps(body).encode())


@attack("replayed")
def replayed_order(siege: Siege) -> None:
    """The order of an earlier rollout comes back after a later one."""
    first = siege.signed("1.0", order="first")
    siege.device.take(first)
    siege.device.take(siege.signed("2.0", order="second"))
    siege.device.take(first)


@attack("replayed")
def replayed_abort(siege: Siege) -> None:
    """An abort of yesterday comes back when its rollout was begun again."""
    siege.device.take(siege.signed(order="rollout"))
    abort = siege.signed(order="rollout", action="abort")
    siege.device.take(abort)
    siege.device.take(siege.signed(order="again"))
    siege.device.take(abort)


@attack("replayed")
def replayed_order_after_loss_of_state(siege: Siege) -> None:
    """The same, when the device has lost its state file: the floor remembers."""
    first = siege.signed("1.0", order=EVIL)
    siege.device.take(siege.signed("2.0", order="second"))
    floor = read_floor(RealFiles(siege.device.root))
    siege.device.state = DeviceState(seqs=floor.orders)
    siege.device.take(first)


@attack("expired")
def expired_order(siege: Siege) -> None:
    """An order that is no longer in force."""
    envelope = siege.signed(order=EVIL, expires=siege.now + 3600)
    siege.pass_time(3600 + siege.rng.uniform(0, 10 * DAY_S))
    siege.repository.refresh(siege.now)
    siege.device.take(envelope)


@attack("too-early")
def order_of_the_future(siege: Siege) -> None:
    """An order that is shown before it begins."""
    siege.device.take(siege.signed(order=EVIL, not_before=siege.now + 3600))


@attack("not-concerned")
def order_for_another_group(siege: Siege) -> None:
    """A good order, handed to a device of another group."""
    siege.device.take(siege.signed(order=EVIL, group="site-8"))


@attack("not-concerned")
def order_for_another_device(siege: Siege) -> None:
    """A good order for one device, handed to another."""
    siege.device.take(siege.signed(order=EVIL, device="robot-2"))


@attack("not-concerned")
def order_for_a_part_without_this_device(siege: Siege) -> None:
    """A good order for the first stage, handed to a device that is not in it."""
    percent = orders.point("s", "robot-1") * siege.rng.uniform(0, 0.99)
    siege.device.take(siege.signed(order=EVIL, cohort=Cohort("s", percent)))


@attack("downgrade")
def downgrade_without_leave(siege: Siege) -> None:
    """An order for an older release than was kept, without leave to go back."""
    siege.device.state = replace(siege.device.state, floors={NAME: 2})
    siege.device.take(siege.signed("1.0", order=EVIL, policy=Policy()))


@attack("wrong-release")
def order_for_another_release(siege: Siege) -> None:
    """An order whose version and hash do not belong together."""
    _, old = siege.repository.release(NAME, "1.0")
    siege.device.take(siege.signed("2.0", order=EVIL, release_sha256=old))


@attack("unknown-release")
def order_for_no_release(siege: Siege) -> None:
    """An order for what was never published."""
    made = replace(siege.order(order=EVIL), version="7.7")
    siege.device.take(siege.repository.sign_order(made))


@attack("signature", "epoch")
def order_of_a_revoked_operator(siege: Siege) -> None:
    """A stolen operator's key signs after it was taken away."""
    stolen = siege.stolen("orders", 1)[0]
    siege.repository.revoke_order_key("alice", siege.now)
    siege.device.refresh()
    siege.device.take(orders.sign(siege.order(order=EVIL), [stolen.signer]))


@attack("epoch")
def order_of_an_operator_before_the_revocation(siege: Siege) -> None:
    """What the operators signed before one of them was revoked is void."""
    left = siege.stolen("orders", 2)[1]
    made = siege.order(order=EVIL)
    siege.repository.revoke_order_key("alice", siege.now)
    siege.device.take(orders.sign(made, [left.signer]))


@attack("signature", "epoch")
def highest_number_of_a_stolen_key(siege: Siege) -> None:
    """A thief signs the highest number there is; after the revocation orders count again."""
    stolen = siege.stolen("orders", 1)[0]
    highest = replace(siege.order(), order="blocker", seq=2**32 - 1)
    envelope = orders.sign(highest, [stolen.signer])
    siege.device.take(envelope)
    siege.repository.revoke_order_key("alice", siege.now)
    siege.device.take(envelope)


@attack("signature")
def operator_of_another_group(siege: Siege) -> None:
    """An operator of one site orders at another."""
    key = siege.repository.add_order_key("carol", siege.now, groups=("site-8",))
    siege.device.take(orders.sign(siege.order(order=EVIL), [key.signer]))


@attack("malformed")
def unreadable_envelope(siege: Siege) -> None:
    """Bytes that are no envelope."""
    siege.device.take(
        siege.rng.choice(
            [
                b"",
                b"null",
                b"\xff",
                b"[" * 60_000,
                b'{"payload": "!", "payloadType": 1, "signatures": {}}',
                b'{"payload": "", "payload": "", "payloadType": "x", "signatures": []}',
                b'{"payload": "YQ==", "payloadType": "x", "signatures": [{"sig": "YQ=="}]}',
                siege.rng.randbytes(siege.rng.randrange(5000)),
                b" " * (orders.MAX_ENVELOPE_BYTES + 1),
            ]
        )
    )


BAD_BODIES: dict[str, Change] = {
    "negative number": lambda o: o.update(seq=-1),
    "number zero": lambda o: o.update(seq=0),
    "number too large": lambda o: o.update(seq=2**53),
    "number a float": lambda o: o.update(seq=1.5),
    "number true": lambda o: o.update(seq=True),
    "path upwards": lambda o: o.update(version="../../2.0"),
    "absolute path": lambda o: o.update(bundle="/etc"),
    "percent above": lambda o: o["cohort"].update(percent=101),
    "unknown key": lambda o: o.update(run="rm"),
    "missing key": lambda o: o.pop("policy"),
    "unknown action": lambda o: o.update(action="shell"),
    "file mirror": lambda o: o.update(mirrors=["file:///etc/"]),
    "mirror with a user": lambda o: o.update(mirrors=["http://a:b@c/"]),
    "later schema": lambda o: o.update(schema=2),
    "endless window": lambda o: o.update(window={"tz": "UTC", "start": "00:00", "minutes": 10**9}),
    "time zone of a file": lambda o: o.update(
        window={"tz": "../../../etc/passwd", "start": "00:00", "minutes": 5, "days": []}
    ),
}


@attack("malformed", "epoch", "time-zone")
def well_signed_nonsense(siege: Siege) -> None:
    """An operator's key signs what no order may be."""
    siege.device.take(with_signed_body(siege, BAD_BODIES[siege.rng.choice(sorted(BAD_BODIES))]))


def _flip(siege: Siege, data: bytes) -> bytes:
    changed = bytearray(data)
    changed[siege.rng.randrange(len(data))] ^= 1 << siege.rng.randrange(8)
    return bytes(changed)


def _with_release(siege: Siege, change: Callable[[Siege, bytes], bytes | None]) -> bytes:
    """An honest order; the mirror shows another release under its name."""
    _, sha256 = siege.repository.release(NAME, "2.0")
    path = next(siege.repository.folder.glob(f"targets/**/{sha256}.release.json"))
    name = str(path.relative_to(siege.repository.folder))
    siege.mirror.files[name] = change(siege, path.read_bytes())
    return siege.signed(order=EVIL)


def _forged_targets(siege: Siege, signers: list[Any]) -> None:
    forged = siege.forgery()
    online = {role: siege.stolen(role, 1) for role in ("snapshot", "timestamp")}
    forged.write({"targets": signers, **online}, siege.now)


def _write_snapshot(forged: SignedMetadata, siege: Siege) -> None:
    """Sign snapshot and timestamp over what lies in the folder, without a word about its bytes."""
    snapshot = forged.sign("snapshot", siege.stolen("snapshot", 1), siege.now)
    version = forged.snapshot.signed.version
    (forged.folder / f"{version}.snapshot.json").write_bytes(snapshot)
    forged.timestamp.signed.snapshot_meta.version = version
    timestamp = forged.sign("timestamp", siege.stolen("timestamp", 1), siege.now)
    (forged.folder / "timestamp.json").write_bytes(timestamp)


def _forged_root(siege: Siege, signers: list[Any], threshold: int = 2) -> None:
    forged = siege.forgery()
    role = forged.root.signed.roles["root"]
    role.keyids.clear()
    role.threshold = threshold
    for key in signers:
        forged.root.signed.add_key(key.signer.public_key, "root")
    data = forged.sign("root", signers, siege.now)
    (forged.folder / f"{forged.root.signed.version}.root.json").write_bytes(data)


def with_changed_body(siege: Siege, change: Change) -> bytes:
    """An honest order with one thing changed after it was signed."""
    body = json.loads(siege.signed(**BEFORE))
    order = json.loads(b64decode(body["payload"]))
    change(order)
    body["payload"] = b64encode(wire.encode(order)).decode()
    return json.dumps(body).encode()


def with_signed_body(siege: Siege, change: Change) -> bytes:
    """An order with one thing changed before an operator's key signs it."""
    from securesystemslib.dsse import Envelope

    order = json.loads(b64decode(json.loads(siege.signed(order=EVIL))["payload"]))
    change(order)
    envelope = Envelope(wire.encode(order), orders.PAYLOAD_TYPE, {})
    envelope.sign(siege.stolen("orders", 1)[0].signer)
    return wire.encode(envelope.to_dict())
