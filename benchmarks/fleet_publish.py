# SPDX-License-Identifier: Apache-2.0
"""Publishes a bundle into a fresh repository, then a second version with some files changed.

    python benchmarks/fleet_publish.py BUNDLE REPOSITORY [--copy] [--json FILE]

Without BUNDLE's folder, a synthetic one with the 30B's shapes is written there (17 GB). REPOSITORY
should be on the same file system, so that blobs are second names of the bundle's files. Stamps of
earlier hashing are ignored: every byte is hashed, once.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from build_engine.synthetic import write_synthetic
from edgecascade.fleet.keys import KeyFolders
from edgecascade.fleet.refresh import Trust, folder_fetch
from edgecascade.fleet.repository import Offer, Repository


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--copy", action="store_true", help="copies instead of second names")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.bundle.exists():
        write_synthetic(args.bundle)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        results = measure(args.bundle, args.repository, link=not args.copy)
    print(json.dumps(results, indent=1))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    shutil.rmtree(args.repository)


def measure(bundle: Path, folder: Path, *, link: bool) -> dict[str, Any]:
    now = time.time()
    keys = KeyFolders([folder.with_name(f"{folder.name}-keys")])
    repository = Repository.init(folder, keys, now)
    started, cpu = time.monotonic(), time.process_time()
    done = repository.publish(bundle, Offer("synthetic", "1"), now, link=link)
    seconds, cpu_s = time.monotonic() - started, time.process_time() - cpu
    started = time.monotonic()
    again = repository.publish(bundle, Offer("synthetic", "2", config={"flush_ms": 20}), now)
    again_s = time.monotonic() - started
    with tempfile.TemporaryDirectory() as root:
        started = time.monotonic()
        first = (folder / "metadata" / "1.root.json").read_bytes()
        trust = Trust(Path(root), first, folder_fetch(folder))
        trust.refresh(now)
        trust.release("synthetic", "2", again.sha256)
        device_s = time.monotonic() - started
    shutil.rmtree(keys.folders[0])
    total = sum(done.release.blobs.values())
    return {
        "bytes": total,
        "blobs": len(done.release.blobs),
        "linked": link,
        "publish_s": round(seconds, 2),
        "cpu_s": round(cpu_s, 2),
        "mb_per_cpu_s": round(total / 1e6 / cpu_s),
        "publish_again_s": round(again_s, 2),
        "blobs_written_again": again.blobs_written,
        "device_refresh_s": round(device_s, 3),
        "release_bytes": len(done.release.to_bytes()),
        "max_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "cores": len(os.sched_getaffinity(0)),
    }


if __name__ == "__main__":
    main()
