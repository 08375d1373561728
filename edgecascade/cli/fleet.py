# SPDX-License-Identifier: Apache-2.0
"""fleet init · publish · keys · devices · audit, the rollouts of cli/rollouts.py, and relay"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from edgecascade.cli import relay, rollouts
from edgecascade.cli.show import print_facts, print_json
from edgecascade.errors import InvalidRequest

if TYPE_CHECKING:
    from edgecascade.fleet.home import Home
    from edgecascade.fleet.release import GoldenPrompt, Health

FOLDER = "EDGECASCADE_FLEET"
PASSWORD = "EDGECASCADE_KEYS_PASSWORD"
GOLDEN_TOKENS = 16


def add(commands: Any) -> None:
    """The commands and their options."""
    fleet = commands.add_parser("fleet", help="publish bundles and roll them out to a fleet")
    acts = fleet.add_subparsers(dest="act", required=True, metavar="ACT")
    _add_init(acts)
    _add_publish(acts)
    _add_keys(acts)
    _add_devices(acts)
    rollouts.add(acts, home_options, home)
    relay.add(acts, home_options, home)
    log = acts.add_parser("audit", help="what was done, one line each")
    home_options(log)
    log.add_argument("--verify", action="store_true", help="check that no line was changed")
    log.add_argument("--expect", metavar="HASH", help="a head seen before, which must be there")
    log.add_argument("--json", action="store_true")
    log.set_defaults(run=_audit)


def home_options(parser: argparse.ArgumentParser) -> None:
    """Where the operator's folder and keys are."""
    parser.add_argument(
        "--fleet",
        metavar="FOLDER",
        default=os.environ.get(FOLDER, "fleet"),
        help=f"the operator's folder (default: ${FOLDER}, or fleet)",
    )
    parser.add_argument(
        "--keys",
        metavar="FOLDER",
        action="append",
        default=[],
        help="folder or stick with private keys; may be given several times (default: FLEET/keys)",
    )


def home(args: argparse.Namespace) -> Home:
    """The operator's folder; the password of the keys comes from the environment."""
    from edgecascade.fleet.home import Home

    return Home(args.fleet, args.keys, os.environ.get(PASSWORD))


def _add_init(acts: Any) -> None:
    init = acts.add_parser("init", help="make keys and an empty repository")
    home_options(init)
    init.add_argument(
        "--profile", default="small", help="small: one person; full: 2 of 3 sign (docs/fleet.md)"
    )
    init.add_argument(
        "--operator", action="append", metavar="NAME", help="who may sign orders; several times"
    )
    init.set_defaults(run=_init)


def _init(args: argparse.Namespace) -> int:
    where = home(args)
    repository = where.init(args.profile, args.operator or ["operator"])
    print_facts(
        {
            "repository": f"{where.served}, serve it over HTTP or copy it to a stick",
            "keys": ", ".join(f"{folder}" for folder in where.keys.folders),
            "root.json": f"{where.folder / 'root.json'}, give it to every device",
            "operators": ", ".join(key.owner for key in repository.order_keys().keys),
        }
    )
    return 0


def _add_publish(acts: Any) -> None:
    publish = acts.add_parser("publish", help="add a bundle to the repository")
    home_options(publish)
    publish.add_argument("bundle")
    publish.add_argument("--name", required=True, help="of the model; stays the same")
    publish.add_argument("--version", required=True, help="each is published once")
    publish.add_argument("--health", metavar="FILE", help="YAML: what a device must find")
    publish.add_argument(
        "--golden",
        metavar="TEXT",
        action="append",
        default=[],
        help="ask the bundle here; devices must give the same tokens; several times",
    )
    publish.add_argument("--requires", metavar="FILE", help="YAML: what a device must be")
    publish.add_argument("--config", metavar="FILE", help="YAML: options of serve, from the fleet")
    publish.add_argument("--delta-from", metavar="VERSION", action="append", default=[])
    publish.add_argument("--copy", action="store_true", help="instead of hard links")
    publish.add_argument("--json", action="store_true")
    publish.set_defaults(run=_publish)


def _publish(args: argparse.Namespace) -> int:
    from edgecascade.fleet.release import Requires
    from edgecascade.fleet.repository import Offer
    from edgecascade.service.config import read_yaml

    where = home(args)
    offer = Offer(
        args.name,
        args.version,
        requires=_document(Requires, args.requires, "requires"),
        health=_health(args),
        config=read_yaml(args.config, args.config) if args.config else {},
        deltas_from=tuple(args.delta_from),
    )
    done = where.repository().publish(args.bundle, offer, time.time(), link=not args.copy)
    release = done.release
    facts: dict[str, str | int] = {
        "release": f"{release.name} {release.version}",
        "seq": release.seq,
        "release_sha256": done.sha256,
        "bundle": release.manifest.sha256,
        "bytes": sum(release.blobs.values()),
        "blobs_written": done.blobs_written,
        "bytes_written": done.bytes_written,
        "blobs_shared": done.blobs_shared,
        "deltas": len(release.deltas),
    }
    where.note("publish", facts)
    if args.json:
        print_json(facts)
    else:
        words = {name: value if isinstance(value, str) else f"{value:,}"
                 for name, value in facts.items()}  # fmt: skip
        print_facts(words)
    return 0


def _health(args: argparse.Namespace) -> Health:
    from dataclasses import replace

    from edgecascade.fleet.release import Health

    health: Health = _document(Health, args.health, "health")
    if not args.golden:
        return health
    return replace(health, prompts=(*health.prompts, *_golden(args.bundle, args.golden)))


def _golden(bundle: str, texts: list[str]) -> list[GoldenPrompt]:
    """Questions with the tokens that this bundle answers here, greedily."""
    from edgecascade.fleet.release import GoldenPrompt
    from edgecascade.llm import LLM

    with LLM.load(bundle, slots=1) as llm:
        answers = [
            llm.generate(text, raw=True, max_tokens=GOLDEN_TOKENS, temperature=0.0)
            for text in texts
        ]
    return [
        GoldenPrompt(prompt=text, max_tokens=GOLDEN_TOKENS, tokens=answer.token_ids)
        for text, answer in zip(texts, answers, strict=True)
    ]


def _document(kind: type, path: str | None, what: str) -> Any:
    """A dataclass from a YAML file; what is not given is as by default."""
    from edgecascade.fleet import strict
    from edgecascade.service.config import read_yaml

    try:
        return strict.read(kind, read_yaml(path, path) if path else {}, what, defaults=True)
    except strict.BadDocument as error:
        raise InvalidRequest(f"{path}: {error}") from None


def _add_keys(acts: Any) -> None:
    keys = acts.add_parser("keys", help="who signs what, until when; new and stolen keys")
    home_options(keys)
    what = keys.add_mutually_exclusive_group()
    what.add_argument("--refresh", action="store_true", help="sign again what expires soon")
    what.add_argument("--add-operator", metavar="NAME", help="a key that may sign orders")
    what.add_argument("--revoke-operator", metavar="NAME", help="its orders are void from now on")
    what.add_argument("--rotate", metavar="ROLE", help="new keys for root, targets, snapshot ...")
    what.add_argument("--delegate", metavar="MODEL", help="keys of its own for a model's releases")
    keys.add_argument("--group", action="append", default=[], help="of --add-operator: only these")
    keys.add_argument("--lost", metavar="KEYID", action="append", default=[], help="of --rotate")
    keys.add_argument("--json", action="store_true")
    keys.set_defaults(run=_keys)


def _keys(args: argparse.Namespace) -> int:
    if args.lost and not args.rotate:
        raise InvalidRequest(f"--lost {args.lost[0]} is of --rotate ROLE, which is not given")
    if args.group and not args.add_operator:
        raise InvalidRequest(f"--group {args.group[0]} is of --add-operator, which is not given")
    where = home(args)
    repository, now = where.repository(), time.time()
    if args.refresh:
        repository.refresh(now)
        where.note("keys-refresh", {})
    elif args.add_operator:
        made = repository.add_order_key(args.add_operator, now, args.group)
        where.note("keys-add", {"operator": args.add_operator, "public": made.public})
    elif args.revoke_operator:
        after = repository.revoke_order_key(args.revoke_operator, now)
        where.note("keys-revoke", {"operator": args.revoke_operator, "epoch": after.epoch})
    elif args.rotate:
        new = repository.rotate(args.rotate, now, lost=args.lost)
        where.put_root(repository)
        where.note("keys-rotate", {"role": args.rotate, "new": [key.keyid for key in new]})
    elif args.delegate:
        new = repository.delegate(args.delegate, now)
        where.note("keys-delegate", {"model": args.delegate, "new": [key.keyid for key in new]})
    _show_keys(where, as_json=args.json)
    return 0


def _show_keys(where: Home, *, as_json: bool) -> None:
    from edgecascade.fleet.metadata import SignedMetadata

    metadata = SignedMetadata(where.served / "metadata")
    known = where.repository().order_keys()
    at_hand = {role: {key.keyid for key in where.keys.keys(role)} for role in metadata.expiries()}
    if as_json:
        roles = {
            role: {
                "expires": expires,
                "keys": {key: key in at_hand[role] for key in metadata.keyids(role)},
            }
            for role, expires in metadata.expiries().items()
        }
        operators = [
            {"name": key.owner, "public": key.public, "groups": key.groups} for key in known.keys
        ]
        print_json({"roles": roles, "operators": operators})
        return
    for role, expires in metadata.expiries().items():
        print(f"{role}: signed until {_day(expires)}")
        for key in metadata.keyids(role):
            print(f"  {key} {'at hand' if key in at_hand[role] else 'elsewhere'}")
    for operator in known.keys:
        groups = ", ".join(operator.groups) or "all groups"
        print(f"operator {operator.owner}: signs orders for {groups}")


def _day(at: float) -> str:
    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _add_devices(acts: Any) -> None:
    devices = acts.add_parser("devices", help="whose reports count: enroll and revoke devices")
    home_options(devices)
    what = devices.add_mutually_exclusive_group()
    what.add_argument(
        "--enroll", metavar="FILE", nargs="+", help="what edgecascade agent enroll wrote"
    )
    what.add_argument(
        "--revoke", metavar="DEVICE", nargs="+", help="stolen or gone: it counts no more"
    )
    devices.add_argument("--json", action="store_true")
    devices.set_defaults(run=_devices)


def _devices(args: argparse.Namespace) -> int:
    from edgecascade.fleet import reports

    where, now = home(args), time.time()
    if args.enroll:
        keys = [reports.read_enrolment(_small_file(path)) for path in args.enroll]
        where.register.enroll(keys, now)
        for key in keys:
            facts = {"device": key.device, "public": key.public, "groups": list(key.groups)}
            where.note("devices-enroll", facts)
    elif args.revoke:
        where.register.revoke(args.revoke, now)
        for name in args.revoke:
            where.note("devices-revoke", {"device": name})
    entries = where.register.read().entries
    if args.json:
        print_json(
            [{**asdict(each.key), "since": each.since, "revoked": each.revoked} for each in entries]
        )
        return 0
    for each in entries:
        word = f"revoked {_day(each.revoked)}" if each.revoked is not None else "enrolled"
        groups = ", ".join(each.key.groups)
        print(f"{each.key.device}: {word}, groups {groups}, key {each.key.public[:16]}")
    return 0


def _small_file(path: str) -> bytes:
    from edgecascade.fleet.reports import MAX_ENROLMENT_BYTES

    try:
        with open(path, "rb") as source:
            return source.read(MAX_ENROLMENT_BYTES + 1)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from None


def _audit(args: argparse.Namespace) -> int:
    from edgecascade.fleet import audit

    log = home(args).log
    if not log.exists():
        raise InvalidRequest(f"there is no {log}; --fleet names the operator's folder")
    if args.verify or args.expect:
        verdict = audit.verify(log, args.expect)
        if args.json:
            print_json({"lines": verdict.lines, "head": verdict.head})
        else:
            print_facts(
                {"lines": f"{verdict.lines}, each fits the one before", "head": verdict.head}
            )
        return 0
    for raw, record in audit.records(log):
        if args.json or record is None:
            print(raw.decode("utf-8", "replace").rstrip("\n"))
        else:
            at, event = _day(record.pop("ts", 0.0)), record.pop("event", "?")
            record.pop("prev", None)
            facts = ", ".join(f"{key} {value}" for key, value in record.items() if value)
            print(f"{at}  {event:14s} {facts}")
    return 0
