# SPDX-License-Identifier: Apache-2.0
"""A large bundle over HTTP, killed at random points: what is fetched again, how fast it verifies.

The blobs are zeros but for their first bytes, and are written in full on the device's side. The
device is a process of its own that is killed (SIGKILL) when the server has sent so many bytes.

    python benchmarks/fleet_resume.py --gb 17 --interruptions 50 --json result.json
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from edgecascade.fleet.fetch import Blob, Downloader, Pace
from edgecascade.fleet.fs import RealFiles
from edgecascade.fleet.release import FileRef, Release
from edgecascade.fleet.sources import HttpSource
from edgecascade.fleet.store import Store

ROOT = Path(__file__).resolve().parent.parent
BLOB_BYTES = 64 << 20
ZEROS = bytes(1 << 20)
HEAD_BYTES = 16


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


def release_of(size: int) -> tuple[Release, dict[str, tuple[int, int]]]:
    """A release of so many bytes, and the number and size of each of its blobs."""
    sizes = [BLOB_BYTES] * (size // BLOB_BYTES) + ([size % BLOB_BYTES] if size % BLOB_BYTES else [])
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(digest_of, range(len(sizes)), sizes))
    count = len(sizes) - 1
    refs = [
        FileRef("manifest.json" if i == 0 else f"weights-{i:05}-of-{count:05}.safetensors", *facts)
        for i, facts in enumerate(zip(sizes, digests, strict=True))
    ]
    release = Release("large", "1", 1, refs[0], tuple(refs[1:]))
    return release, {ref.sha256: (i, ref.size) for i, ref in enumerate(refs)}


class Server(http.server.ThreadingHTTPServer):
    """Serves ranges of the blobs; counts what it sends."""

    daemon_threads = True

    def __init__(self, blobs: dict[str, tuple[int, int]]) -> None:
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


def device(root: Path, document: Path, url: str) -> None:
    """The process that is killed: fetches what is missing, adopts what is whole."""
    from edgecascade.fleet import release as releases

    store = Store(RealFiles(root))
    store.prepare()
    release = releases.parse(document.read_bytes())
    blobs = [Blob(sha256, size) for sha256, size in store.missing(release).items()]
    downloader = Downloader(root / "partial", [HttpSource(url)], pace=Pace())
    downloader.fetch(blobs, lambda blob, path: store.adopt(blob.sha256))


def run(size: int, interruptions: int, seed: int, place: Path) -> dict[str, Any]:
    rng = random.Random(seed)
    root, document = place / "device", place / "release.json"
    root.mkdir()
    release, blobs = release_of(size)
    document.write_bytes(release.to_bytes())
    store = Store(RealFiles(root))
    store.prepare()
    need, free = store.need_bytes(release), store.files.free_bytes()
    if need > free:
        raise SystemExit(f"{need:,} bytes are needed, {free:,} are free")
    server = Server(blobs)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    command = [sys.executable, __file__, "--device", str(root), str(document), url]
    points = sorted(rng.randrange(size) for _ in range(interruptions))
    fetched_again: list[str] = []
    kills, began = 0, time.monotonic()
    for point in [*points, None]:
        adopted = {path.name for path in (root / "blobs").iterdir()}
        asked_before = Counter(server.asked)
        server.reached.clear()
        server.limit = (1 << 62) if point is None else max(point, server.sent + 1)
        process = subprocess.Popen(command)
        while process.poll() is None:
            if server.reached.wait(0.05):
                process.kill()
        if process.wait() == 0 and point is not None:
            break  # it was faster than the point
        kills += point is not None
        fetched_again += [name for name in adopted if server.asked[name] > asked_before[name]]
        print(f"{kills:3} kills, {len(adopted):4} of {len(blobs)} blobs, "
              f"{server.sent / 1e9:.2f} GB sent", flush=True)  # fmt: skip
    download_s = time.monotonic() - began
    server.shutdown()
    server.server_close()
    verified = _verify(store, release, size, place)
    missing = store.missing(release)
    return {
        "bytes": size,
        "blobs": len(blobs),
        "interruptions": kills,
        "seed": seed,
        "verified_blobs_fetched_again": len(fetched_again),
        "bytes_sent": server.sent,
        "sent_beyond_percent": round(100 * (server.sent - size) / size, 2),
        "missing": len(missing),
        "download_s": round(download_s, 1),
        "disk_bytes": sum(f.stat().st_blocks * 512 for f in root.rglob("*") if f.is_file()),
        "need_bytes_said": need,
        **verified,
    }


def _verify(store: Store, release: Release, size: int, place: Path) -> dict[str, Any]:
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")  # no stamp of an earlier run
    before, began = os.times(), time.monotonic()
    damaged = store.verify(release)
    after, wall_s = os.times(), time.monotonic() - began
    cpu_s = after.user + after.system - before.user - before.system
    return {
        "damaged": len(damaged),
        "verify_s": round(wall_s, 2),
        "verify_cpu_s": round(cpu_s, 2),
        "verify_mb_per_s_per_core": round(size / 1e6 / cpu_s),
        "cores": len(os.sched_getaffinity(0)),
    }


def main() -> int:
    if sys.argv[1:2] == ["--device"]:
        device(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
        return 0
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=17.0)
    parser.add_argument("--interruptions", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", help="where there is room for all of it (default: temporary)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    place = Path(tempfile.mkdtemp(prefix="fleet-resume-", dir=args.folder))
    try:
        result = run(int(args.gb * 1e9), args.interruptions, args.seed, place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(json.dumps(result, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    bad = result["verified_blobs_fetched_again"] or result["missing"] or result["damaged"]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
