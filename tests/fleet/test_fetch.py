# SPDX-License-Identifier: Apache-2.0
"""Blobs come from mirrors that fail: resumed, bounded, paced. The faults of F8 are apart."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgecascade.errors import DownloadFailed, InvalidRequest
from edgecascade.fleet import fetch
from edgecascade.fleet.faults.web import Answer, Request, Site, head_of, serve
from edgecascade.fleet.fetch import Blob, Downloader, DownloadStopped, Pace, Throttle
from edgecascade.fleet.settings import AgentSettings
from edgecascade.fleet.sources import (
    FolderSource,
    HttpSource,
    Origin,
    Patience,
    Source,
    SourceFault,
    origin_of,
    read_file,
    source_of,
)

PATIENCE = Patience(connect_s=5, head_s=5, read_s=5)
PACE = Pace(parallel=2, rounds=2, pause_s=0.01)
RNG = random.Random(7)
FILES = {hashlib.sha256(d).hexdigest(): d for d in (RNG.randbytes(n) for n in (900_000, 70_001, 0))}
BLOBS = [Blob(name, len(data)) for name, data in FILES.items()]


class Store:
    """Takes what a download brings."""

    def __init__(self, folder: Path) -> None:
        self.partial = folder / "partial"
        self.kept: dict[str, bytes] = {}

    def keep(self, blob: Blob, path: Path) -> None:
        self.kept[blob.sha256] = path.read_bytes()
        path.unlink()

    def fetch(self, *sources: Source, pace: Pace = PACE, **options: object) -> None:
        downloader = Downloader(self.partial, sources, pace=pace, patience=PATIENCE, **options)  # type: ignore[arg-type]
        downloader.fetch(BLOBS, self.keep)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def http(site: Site, **options: object) -> HttpSource:
    return HttpSource(site.url, PATIENCE, **options)  # type: ignore[arg-type]


def cut_at(*positions: int) -> Callable[[Request], Callable[[Request, Answer], None] | None]:
    """The n-th question for the large file is cut after so many bytes of its answer."""

    def fault(request: Request) -> Callable[[Request, Answer], None] | None:
        if request.number >= len(positions) or len(request.data) < 900_000:
            return None
        text, body = head_of(request)
        return lambda _, answer: answer.write(text, body[: positions[request.number]])

    return fault


def test_no_byte_is_asked_for_twice(store: Store) -> None:
    with Site(FILES, cut_at(300_000, 100_000, 250_000)) as site:
        store.fetch(http(site))
        large = BLOBS[0].sha256
        assert store.kept == FILES
        assert site.sent[large] == 900_000
        assert [r.start for r in site.log if r.path == large] == [None, 300_000, 400_000, 650_000]
        marks = {r.if_range for r in site.log if r.path == large}
        assert len(marks - {None}) == 1
    assert list(store.partial.iterdir()) == []


def test_a_download_goes_on_after_a_restart_of_the_device(store: Store) -> None:
    store.partial.mkdir()
    (store.partial / BLOBS[0].sha256).write_bytes(FILES[BLOBS[0].sha256][:500_000])
    with Site(FILES) as site:
        store.fetch(http(site))
        assert site.sent[BLOBS[0].sha256] == 400_000
    assert store.kept == FILES


def test_what_is_whole_already_is_not_asked_for(store: Store) -> None:
    store.partial.mkdir()
    for name, data in FILES.items():
        (store.partial / name).write_bytes(data)
    store.fetch()
    assert store.kept == FILES


def test_mirrors_are_asked_in_their_order(store: Store) -> None:
    with Site(FILES) as first, Site(FILES) as second:
        store.fetch(http(first), http(second))
        assert second.log == []
    assert store.kept == FILES


def test_a_mirror_that_never_has_the_right_bytes_is_asked_no_more(tmp_path: Path) -> None:
    files = {hashlib.sha256(d).hexdigest(): d for d in (RNG.randbytes(1000) for _ in range(8))}
    blobs = [Blob(name, 1000) for name in files]
    kept = []
    pace = replace(PACE, parallel=1)
    with Site({name: bytes(1000) for name in files}) as bad, Site(files) as good:
        loader = Downloader(tmp_path, [http(bad), http(good)], pace=pace, patience=PATIENCE)
        loader.fetch(blobs, lambda blob, path: kept.append(blob))
        assert len(bad.log) == fetch.MAX_WRONG
    assert kept == blobs


def test_what_the_wire_corrupts_once_is_asked_for_again(store: Store) -> None:
    name = BLOBS[0].sha256

    def once(request: Request) -> Callable[[Request, Answer], None] | None:
        if request.path != name or request.number:
            return None
        return lambda _, answer: answer.write(head_of(request)[0], bytes(900_000))

    with Site(FILES, once) as site:
        store.fetch(http(site))
        assert [request.start for request in site.log if request.path == name] == [None, None]
    assert store.kept == FILES


def test_what_is_wrong_twice_is_not_asked_for_a_third_time(store: Store) -> None:
    name = BLOBS[0].sha256
    with Site({**FILES, name: bytes(900_000)}) as site:
        with pytest.raises(DownloadFailed) as failed:
            store.fetch(http(site))
        assert (failed.value.reason, failed.value.final) == ("wrong-hash", True)
        assert len([request for request in site.log if request.path == name]) == 2


def test_a_mixture_of_two_mirrors_is_untangled(store: Store) -> None:
    """The first gives half of something else and dies; the second has it right."""
    name = BLOBS[0].sha256
    wrong = {**FILES, name: bytes(900_000)}

    def dies(request: Request) -> Callable[[Request, Answer], None] | None:
        if request.path != name:
            return None
        if request.number:
            return lambda _, answer: answer.reset()
        return lambda _, answer: answer.write(head_of(request)[0], bytes(400_000))

    with Site(wrong, dies) as first, Site(FILES) as second:
        store.fetch(http(first), http(second))
    assert store.kept == FILES


def test_a_failure_names_what_each_mirror_did(store: Store, tmp_path: Path) -> None:
    with Site({}) as empty, Site(FILES) as gone:
        dead = http(gone)
    with Site({}) as empty, pytest.raises(DownloadFailed) as failed:
        store.fetch(http(empty), dead)
    assert failed.value.mirrors[empty.url].startswith("absent: status 404")
    assert failed.value.mirrors[gone.url].startswith("unreachable")
    assert not failed.value.final
    with Site({}) as empty, pytest.raises(DownloadFailed) as failed:
        store.fetch(http(empty))
    assert (failed.value.reason, failed.value.final) == ("absent", True)


def test_stop_ends_it_and_keeps_what_came(store: Store) -> None:
    begun = threading.Event()

    def stalls(request: Request, answer: Answer) -> None:
        text, body = head_of(request)
        answer.write(text, body[:500_000])
        answer.sleep(30)

    def on_bytes(count: int) -> None:
        begun.set()

    with Site(FILES, lambda request: stalls if len(request.data) > 500_000 else None) as site:
        loader = Downloader(store.partial, [http(site)], pace=PACE, on_bytes=on_bytes)
        stopped: list[BaseException] = []

        def work() -> None:
            try:
                loader.fetch(BLOBS[:1], store.keep)
            except DownloadStopped as error:
                stopped.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        assert begun.wait(10)
        loader.stop()
        thread.join(10)
    assert stopped
    assert (store.partial / BLOBS[0].sha256).stat().st_size > 0


def test_nothing_is_asked_for_when_the_disk_has_no_room(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(store.partial.parent)

    class Full:
        f_bavail, f_frsize = 900_000 // real.f_frsize, real.f_frsize

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    with Site(FILES) as site, pytest.raises(DownloadFailed) as failed:
        store.fetch(http(site))
    assert failed.value.reason == "disk-full"
    assert site.log == []


def test_the_room_is_held_while_it_is_needed(store: Store) -> None:
    held = []

    def on_bytes(count: int) -> None:
        held.append((store.partial / fetch.RESERVE).stat().st_size)

    with Site(FILES) as site:
        store.fetch(http(site), on_bytes=on_bytes)
    assert max(held) == sum(map(len, FILES.values()))
    assert not (store.partial / fetch.RESERVE).exists()


def test_a_rate_is_kept_over_all_files(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(fetch.time, "monotonic", lambda: now)
    throttle = Throttle(1000)
    waits = [throttle.delay(100) for _ in range(100)]
    assert 9.8 <= waits[-1] <= 10.0  # 10,000 bytes
    now = 1000.0
    assert throttle.delay(1000) == pytest.approx(1.0, abs=fetch.SHARE_S)  # no credit for a pause
    assert Throttle(None).delay(10**9) == 0


def test_a_redirect_leads_only_where_it_is_listed(store: Store) -> None:
    with Site(FILES) as target:

        def sends_on(request: Request, answer: Answer) -> None:
            where = target.url + request.path
            answer.write(f"HTTP/1.1 302 Found\nLocation: {where}\nContent-Length: 0\n\n")

        with Site(FILES, lambda request: sends_on) as site:
            with pytest.raises(DownloadFailed, match="not listed") as failed:
                store.fetch(http(site))
            assert failed.value.reason == "redirected"
            assert target.log == []
            store.fetch(http(site, redirects=frozenset({origin_of(target.url)})))
    assert store.kept == FILES


def test_a_server_that_asks_for_time_gets_it(store: Store) -> None:
    at: list[float] = []

    def busy(request: Request) -> Callable[[Request, Answer], None] | None:
        at.append(time.monotonic())
        text = "HTTP/1.1 503 Busy\nRetry-After: 1\nContent-Length: 0\n\n"
        return (lambda _, answer: answer.write(text)) if len(at) == 1 else serve

    with Site(FILES, busy) as site:
        store.fetch(http(site), pace=replace(PACE, parallel=1))
    assert at[1] - at[0] >= 1.0
    assert store.kept == FILES


def test_identity_is_asked_for_and_a_range_only_when_needed(store: Store) -> None:
    with Site(FILES) as site:
        store.fetch(http(site))
        assert all(b"Accept-Encoding: identity\r\n" in request.head for request in site.log)
        assert not [request for request in site.log if b"Range" in request.head]


def test_a_folder_is_a_mirror(store: Store, tmp_path: Path) -> None:
    stick = tmp_path / "stick"
    stick.mkdir()
    for name, data in FILES.items():
        (stick / name).write_bytes(data)
    store.fetch(source_of(str(stick)))
    assert store.kept == FILES


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "short", "long", "absent", "flipped"])
def test_a_folder_cannot_trick_us(store: Store, tmp_path: Path, kind: str) -> None:
    stick, name = tmp_path / "stick", BLOBS[0].sha256
    stick.mkdir()
    data = FILES[name]
    if kind == "link":
        (tmp_path / "secret").write_bytes(data)
        (stick / name).symlink_to(tmp_path / "secret")
    elif kind == "pipe":
        os.mkfifo(stick / name)
    elif kind == "folder":
        (stick / name).mkdir()
    elif kind != "absent":
        contents = {"short": data[:-1], "long": data + b"x", "flipped": data[:-1] + b"x"}
        (stick / name).write_bytes(contents[kind])
    loader = Downloader(store.partial, [FolderSource(stick)], pace=PACE)
    with pytest.raises(DownloadFailed) as failed:
        loader.fetch(BLOBS[:1], store.keep)
    assert failed.value.final
    assert store.kept == {}


def test_a_small_file_is_read_up_to_its_limit() -> None:
    with Site({"metadata/timestamp.json": b"x" * 1000}) as site:
        assert read_file(http(site), "metadata/timestamp.json", 1000, PATIENCE) == b"x" * 1000
        assert read_file(http(site), "metadata/timestamp.json", 999, PATIENCE) == b"x" * 999
        with pytest.raises(SourceFault, match="404"):
            read_file(http(site), "metadata/root.json", 999, PATIENCE)
    cut = Site({"a": b"x" * 1000}, lambda request: lambda _, answer: answer.write(
        head_of(request)[0], b"x" * 999))  # fmt: skip
    with cut, pytest.raises(SourceFault, match="cut off"):
        read_file(http(cut), "a", 1001, PATIENCE)


@pytest.mark.parametrize("path", ["", "/etc/hostname", "../x", "a/../b", "a//b", "./a", "a\0b"])
def test_a_path_stays_below_the_folder(tmp_path: Path, path: str) -> None:
    for source in (FolderSource(tmp_path), HttpSource("http://127.0.0.1:9/")):
        with pytest.raises(SourceFault, match="no path below"):
            source.open(path, 0, None, None)


@pytest.mark.parametrize(
    "address", ["https://me:hidden@host/", "https://me:hid/den@host/", "ftp://me:hidden@host/"]
)
def test_a_refused_address_shows_no_password(address: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        source_of(address)
    assert "host" in str(refused.value)
    assert "hid" not in str(refused.value)
    with pytest.raises(InvalidRequest, match="is no mirror") as refused:
        AgentSettings(root="/r", mqtt="mqtt://b", device_id="d", caches=(address,))
    assert "hid" not in str(refused.value)


def test_addresses_are_read_strictly(tmp_path: Path) -> None:
    assert origin_of("HTTPS://Host/x") == Origin("https", "host", 443)
    assert isinstance(source_of(f"file://{tmp_path}"), FolderSource)
    for wrong in ("ftp://host/", "http://", "http://user@host/", "http://host:port/"):
        with pytest.raises(InvalidRequest):
            source_of(wrong)
