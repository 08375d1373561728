# SPDX-License-Identifier: Apache-2.0
"""A large bundle over HTTP, killed at random points: what is fetched again, how much disk it takes.

Version A is installed, then B, of which a share of the blobs is new. The device is a process of its
own, with the updater, executor, store and downloader of an agent; it is killed (SIGKILL) when the
server has sent so many bytes, and begins again. Before that, a disk that lacks one byte of the room
for B must be refused without a question to the server. The blobs are zeros but for their first
bytes, and are written in full on the device's side.

    python benchmarks/fleet_resume.py --gb 17 --interruptions 50 --json result.json

It takes disk for A and what is new in B. With `--placed` A is written there and not downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgecascade.fleet.executor import Executor
from edgecascade.fleet.faults.world import Device, Published, World, last_word, order_for
from edgecascade.fleet.fetch import Blob, Downloader, Pace
from edgecascade.fleet.fs import RealFiles
from edgecascade.fleet.orders import Order
from edgecascade.fleet.release import FileRef, Release
from edgecascade.fleet.release import parse as parse_release
from edgecascade.fleet.sources import HttpSource
from edgecascade.fleet.store import MARGIN_BYTES, Store

ROOT = Path(__file__).resolve().parent.parent
BLOB_BYTES = 64 << 20  # at most
LEAST_BLOBS = 20
ZEROS = bytes(1 << 20)
HEAD_BYTES = 16
PLACED = "nowhere"  # in place of a mirror: the device writes the blobs itself
NEW = 1 << 40  # added to the number of a blob that is B's own
SAMPLE_S = 0.2
Blobs = dict[str, tuple[int, int]]  # sha256 -> number, size


def content(index: int, start: int, end: int) -> list[bytes]:
    """Bytes of blob `index`: its number, then zeros."""
    head = index.to_bytes(HEAD_BYTES, "little")
    parts = [head[start:end]] if start < HEAD_BYTES else []
    left = end - max(start, HEAD_BYTES)
    while left > 0:
        parts.append(ZEROS[: min(left, len(ZEROS))])
        left -= len(ZEROS)
    return parts


def digest_of(index: int, size: int) -> str:
    digest = hashlib.sha256()
    for part in content(index, 0, size):
        digest.update(part)
    return digest.hexdigest()


def releases_of(size: int, changed: float, rng: random.Random) -> list[tuple[Published, Blobs]]:
    """A and B of so many bytes; the manifest and this share of B's other blobs are its own."""
    each = min(BLOB_BYTES, size // LEAST_BLOBS)
    sizes = [each] * (size // each) + ([size % each] if size % each else [])
    first = list(range(len(sizes)))
    own = {0, *rng.sample(first[1:], round(changed * (len(sizes) - 1)))}
    return [
        _release_of(number, sizes, [i + NEW if number == 2 and i in own else i for i in first])
        for number in (1, 2)
    ]


def _release_of(number: int, sizes: list[int], indices: list[int]) -> tuple[Published, Blobs]:
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(digest_of, indices, sizes))
    count = len(sizes) - 1
    refs = [
        FileRef("manifest.json" if i == 0 else f"weights-{i:05}-of-{count:05}.safetensors", *facts)
        for i, facts in enumerate(zip(sizes, digests, strict=True))
    ]
    release = Release("large", f"{number}.0", number, refs[0], tuple(refs[1:]))
    blobs = dict(zip(digests, zip(indices, sizes, strict=True), strict=True))
    return Published(release, release.to_bytes(), {}), blobs


class Server(http.server.ThreadingHTTPServer):
    """Serves ranges of the blobs; counts what it sends."""

    daemon_threads = True

    def __init__(self, blobs: Blobs) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.blobs = blobs
        self.sent = 0
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.limit = 1 << 62
        self.reached = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error here."""

    def count(self, size: int) -> None:
        with self.lock:
            self.sent += size
            if self.sent >= self.limit:
                self.reached.set()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        index, size = self.server.blobs[name]
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        with self.server.lock:
            self.server.asked[name] += 1
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(size - start))
        self.send_header("ETag", f'"{name}"')
        if match:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        for part in content(index, start, size):
            self.wfile.write(part)
            self.server.count(len(part))

    def log_message(self, *args: Any) -> None:
        pass


class Disk(RealFiles):
    """A real one, of which at most so many bytes are said to be free."""

    def __init__(self, root: Path, free: int) -> None:
        super().__init__(root)
        self.free = free

    def free_bytes(self) -> int:
        return min(self.free, super().free_bytes())


class Robot(Device):
    """Its downloads are real; its bundles are zeros, and pass every trial."""

    def __init__(self, root: Path, url: str, free: int) -> None:
        super().__init__(Disk(root, free), World([], check_served=False))
        self.root, self.url = root, url
        self.store = Store(self.files)
        self.executor = Executor(self.files, self, store=self.store)

    def download(
        self,
        order: Order,
        release: Release,
        missing: Mapping[str, int],
        keep: Callable[[str], None],
    ) -> None:
        if self.url == PLACED:
            for index, file in enumerate(release.every_file):
                (self.root / "partial" / file.sha256).write_bytes(
                    b"".join(content(index, 0, file.size))
                )
                keep(file.sha256)
            return
        downloader = Downloader(self.root / "partial", [HttpSource(self.url)], pace=Pace())
        blobs = [Blob(sha256, size) for sha256, size in missing.items()]
        downloader.fetch(blobs, lambda blob, path: keep(blob.sha256))


def device(root: Path, document: Path, url: str, seq: int, free: int) -> None:
    """The process that is killed: it boots, takes the order, and says how that ended."""
    data = document.read_bytes()
    what = Published(parse_release(data), data, {})
    robot = Robot(root, url, free).boot()
    robot.settle()
    order = order_for(what, seq)
    robot.deliver(order, what)
    word = last_word(robot.world, order.order)
    active = robot.state.active
    print(json.dumps({
        "state": word and word.state, "evidence": word and dict(word.evidence),
        "active": active and active.version,
    }))  # fmt: skip


@dataclass
class Usage:
    """What a folder takes on the disk, looked at again and again in a `with` block."""

    root: Path
    peak: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Usage:
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, used_bytes(self.root))
            if self._ended.wait(SAMPLE_S):
                return


def used_bytes(root: Path) -> int:
    """Of the disk; a file counts once, whatever names it has."""
    blocks: dict[int, int] = {}
    for folder, _, names in os.walk(root):
        for name in names:
            with suppress(FileNotFoundError):  # it was just given its place
                found = os.lstat(os.path.join(folder, name))
                blocks[found.st_ino] = found.st_blocks
    return 512 * sum(blocks.values())


class Bench:
    """A server of both versions, and a device's folder."""

    def __init__(self, size: int, changed: float, seed: int, place: Path, *, placed: bool) -> None:
        self.placed = placed
        self.rng, self.place, self.root = random.Random(seed), place, place / "device"
        self.root.mkdir()
        self.releases = releases_of(size, changed, self.rng)
        self.server = Server(
            {sha: fact for _, blobs in self.releases for sha, fact in blobs.items()}
        )
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.store = Store(RealFiles(self.root))
        self.store.prepare()
        for number, (what, _) in enumerate(self.releases, 1):
            (place / f"{number}.json").write_bytes(what.document)
        self._orders = 0

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def needs(self, number: int) -> int:
        """What the device says that it needs for a version, after the room was checked."""
        need = self.store.need_bytes(self.releases[number - 1][0].release)
        if need > (free := self.store.files.free_bytes()):
            raise SystemExit(f"{need:,} bytes are needed, {free:,} are free")
        return need

    def spawn(self, number: int, seq: int, free: int = 1 << 62) -> subprocess.Popen[str]:
        """A device that is given an order of this sequence number, for a version."""
        url = f"http://127.0.0.1:{self.server.server_address[1]}/"
        if self.placed and number == 1:
            url = PLACED
        words = [str(self.root), str(self.place / f"{number}.json"), url, str(seq), str(free)]
        command = [sys.executable, __file__, "--device", *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def told(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """What a device says that was left alone."""
        said, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"the device ended with {process.returncode}")
        told: dict[str, Any] = json.loads(said)
        return told

    def _next_seq(self) -> int:
        self._orders += 1
        return self._orders

    def refused(self, number: int) -> dict[str, Any]:
        """A disk that lacks one byte."""
        before = sum(self.server.asked.values())
        told = self.told(self.spawn(number, self._next_seq(), self.needs(number) - 1))
        asked = sum(self.server.asked.values()) - before
        return {**told, "questions_to_the_server": asked}

    def install(self, number: int, interruptions: int) -> dict[str, Any]:
        """Install a version, killed so many times on the way."""
        blobs, server = self.releases[number - 1][1], self.server
        missing = self.store.missing(self.releases[number - 1][0].release)
        size, sent, need = sum(missing.values()), server.sent, self.needs(number)
        before, asked = used_bytes(self.root), Counter(server.asked)
        points = sorted(sent + self.rng.randrange(max(1, size)) for _ in range(interruptions))
        again: list[str] = []
        seq = self._next_seq()
        kills, began = 0, time.monotonic()
        with Usage(self.root) as usage:
            for point in [*points, None]:
                kept, known = set(os.listdir(self.root / "blobs")), Counter(server.asked)
                told = self._life(number, seq, point)
                again += [name for name in kept if server.asked[name] > known[name]]
                if told is not None:
                    break  # the last one, or it was faster than the point
                kills += 1
                print(f"{kills:3} kills, {len(kept):4} blobs of {len(blobs)}, "
                      f"{(server.sent - sent) / 1e9:.2f} GB sent", flush=True)  # fmt: skip
        assert told is not None
        return {
            "ended": told,
            "new_blobs": len(missing),
            "new_bytes": size,
            "interruptions": kills,
            "whole_blobs_fetched_again": len(again),
            "other_blobs_fetched": len((server.asked - asked).keys() - missing.keys()),
            "bytes_sent": server.sent - sent,
            "sent_beyond_percent": round(100 * (server.sent - sent - size) / max(1, size), 2),
            "seconds": round(time.monotonic() - began, 1),
            "need_bytes_said": need,
            "disk_bytes_before": before,
            "disk_bytes_peak": usage.peak,
        }

    def _life(self, number: int, seq: int, point: int | None) -> dict[str, Any] | None:
        """One process; what it says at its end, unless it is killed."""
        server = self.server
        server.reached.clear()
        server.limit = (1 << 62) if point is None else max(point, server.sent + 1)
        process = self.spawn(number, seq)
        while process.poll() is None:
            if server.reached.wait(0.05):
                process.kill()
                process.wait()
        if process.returncode < 0:
            process.communicate()
            return None
        return self.told(process)

    def verify(self, number: int) -> dict[str, Any]:
        """Hash all of it, as if never hashed before."""
        os.environ["XDG_CACHE_HOME"] = str(self.place / "no-stamps")
        release = self.releases[number - 1][0].release
        before, began = os.times(), time.monotonic()
        damaged = self.store.verify(release)
        after, wall_s = os.times(), time.monotonic() - began
        cpu_s = after.user + after.system - before.user - before.system
        return {
            "damaged": len(damaged),
            "missing": len(self.store.missing(release)),
            "seconds": round(wall_s, 2),
            "cpu_s": round(cpu_s, 2),
            "mb_per_s_per_core": round(sum(release.blobs.values()) / 1e6 / max(cpu_s, 1e-3)),
            "cores": len(os.sched_getaffinity(0)),
        }


def run(size: int, changed: float, interruptions: int, seed: int, place: Path, placed: bool) -> Any:
    bench = Bench(size, changed, seed, place, placed=placed)
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    try:
        return {
            "bytes": size,
            "blobs": len(bench.releases[0][1]),
            "seed": seed,
            "first": bench.install(1, 0 if placed else interruptions),
            "refused": bench.refused(2),
            "update": bench.install(2, interruptions),
            "verify": bench.verify(2),
        }
    finally:
        bench.close()


def wrong(result: Mapping[str, Any]) -> list[str]:
    """Promises that were not kept."""
    refused, update, verified = result["refused"], result["update"], result["verify"]
    room = update["disk_bytes_before"] + update["new_bytes"] + MARGIN_BYTES
    promises = {
        "both versions are installed": all(
            result[name]["ended"]["state"] == "SUCCEEDED" for name in ("first", "update")
        ),
        "B answers": update["ended"]["active"] == "2.0",
        "a disk without room is refused": refused["state"] == "REJECTED"
        and refused["evidence"]["reason"] == "disk-full"
        and refused["active"] == "1.0",
        "before the first byte": refused["questions_to_the_server"] == 0,
        "only new blobs are fetched": not any(
            result[name]["other_blobs_fetched"] for name in ("first", "update")
        ),
        "no whole blob is fetched again": not any(
            result[name]["whole_blobs_fetched_again"] for name in ("first", "update")
        ),
        "the disk holds A and what is new": update["disk_bytes_peak"] <= room,
        "all is whole": not verified["damaged"] and not verified["missing"],
    }
    return [promise for promise, kept in promises.items() if not kept]


def main() -> int:
    if sys.argv[1:2] == ["--device"]:
        root, document, url, seq, free = sys.argv[2:]
        device(Path(root), Path(document), url, int(seq), int(free))
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=17.0)
    parser.add_argument("--changed", type=float, default=0.2, help="share of B's blobs that is new")
    parser.add_argument("--interruptions", type=int, default=50, help="of each download")
    parser.add_argument("--placed", action="store_true", help="write A, download only B")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", help="where there is room for all of it (default: temporary)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    place = Path(tempfile.mkdtemp(prefix="fleet-resume-", dir=args.folder))
    size = int(args.gb * 1e9)
    try:
        result = run(size, args.changed, args.interruptions, args.seed, place, args.placed)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(json.dumps(result, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    broken = wrong(result)
    print(f"not kept: {', '.join(broken)}" if broken else "all promises are kept")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
