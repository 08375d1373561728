# SPDX-License-Identifier: Apache-2.0
"""A release: a bundle, named by its files' hashes, and what a device must find before it keeps it.

The document is a target of the TUF repository, so its bytes are trusted as a whole. A blob is a
file of the bundle; the bundle's manifest.json is one too, and its SHA-256 is the bundle's id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from edgecascade import manifest as layout
from edgecascade.errors import UpdateRefused
from edgecascade.fleet import strict
from edgecascade.fleet.orders import NAME, SHA256
from edgecascade.manifest import is_bundle_file
from edgecascade.service import wire

SCHEMA = 1
MAX_RELEASE_BYTES = 4 << 20
MAX_CONFIG_BYTES = 16 << 10
MAX_FILES = 20_000
MAX_PROMPTS = 64
MAX_PROMPT_BYTES = 64 << 10

_VERSION = re.compile(r"\d{1,6}(\.\d{1,6}){0,3}")


@dataclass(frozen=True)
class FileRef:
    """A file of the bundle; its blob has the digest for a name."""

    path: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        if not is_bundle_file(self.path):
            raise ValueError(f"{self.path!r:.80} is no file of a bundle")
        _check_blob(self.size, self.sha256)


@dataclass(frozen=True)
class DeltaRef:
    """Another way to get a blob: what differs from a blob that devices may have."""

    target: str  # SHA-256 of the blob it makes
    base: str  # SHA-256 of the blob it needs
    sha256: str  # its own, and its name among the blobs
    size: int
    codec: Literal["xor+zstd"] = "xor+zstd"

    def __post_init__(self) -> None:
        _check_blob(self.size, self.sha256)
        for digest in (self.target, self.base):
            _check_blob(0, digest)


@dataclass(frozen=True)
class Requires:
    """What a device must be. Empty and 0 ask for nothing."""

    chips: tuple[str, ...] = ()  # tegra234
    jetpack: str = ""  # at least; 6.2
    memory_mb: int = 0
    agent: str = ""  # at least this version of the package

    def __post_init__(self) -> None:
        for name in ("jetpack", "agent"):
            value = getattr(self, name)
            if value and not _VERSION.fullmatch(value):
                raise ValueError(f"{name} is {value!r:.80}; expected a version such as 6.2")
        _check_range("memory_mb", self.memory_mb, 0, 10**9)

    def unmet(
        self, *, chip: str | None, jetpack: str | None, memory_mb: int | None, agent: str
    ) -> tuple[str, ...]:
        """What is missing here, one sentence each; None is what the device cannot tell."""
        missing = []
        if self.chips and chip not in self.chips:
            missing.append(f"needs {' or '.join(self.chips)}, this device is {chip}")
        if self.jetpack and (jetpack is None or version_key(jetpack) < version_key(self.jetpack)):
            missing.append(f"needs JetPack {self.jetpack} or later, this device has {jetpack}")
        if self.memory_mb and (memory_mb is None or memory_mb < self.memory_mb):
            missing.append(f"needs {self.memory_mb} MB of memory, this device has {memory_mb}")
        if self.agent and version_key(agent) < version_key(self.agent):
            missing.append(f"needs edgecascade {self.agent} or later, this device has {agent}")
        return tuple(missing)


@dataclass(frozen=True)
class GoldenPrompt:
    """A question with its answer: one of three ways to ask, and what must come back.

    `tokens` are exact, under greedy decoding; `contains` are parts of the text.
    """

    prompt: str = ""  # continued as it is
    token_ids: tuple[int, ...] = ()
    messages: tuple[dict, ...] = ()  # type: ignore[type-arg]
    max_tokens: int = 16
    tokens: tuple[int, ...] = ()
    contains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if sum(map(bool, (self.prompt, self.token_ids, self.messages))) != 1:
            raise ValueError("a golden prompt has one of prompt, token_ids and messages")
        if not (self.tokens or self.contains):
            raise ValueError("a golden prompt has tokens or contains")
        _check_range("max_tokens", self.max_tokens, 1, 4096)
        for token in (*self.token_ids, *self.tokens):
            _check_range("a token", token, 0, 2**31 - 1)
        if len(wire.encode(asdict(self))) > MAX_PROMPT_BYTES:
            raise ValueError(f"a golden prompt has more than {MAX_PROMPT_BYTES} bytes")


@dataclass(frozen=True)
class Health:
    """What a new bundle must show on the device before it is kept. 0 asks for nothing."""

    load_s: float = 180.0
    prompts: tuple[GoldenPrompt, ...] = ()
    min_tok_s: float = 0.0
    max_temp_c: float = 0.0
    max_memory_mb: int = 0
    soak_s: float = 0.0  # it must serve so long after the switch

    def __post_init__(self) -> None:
        _check_range("load_s", self.load_s, 0.1, 86_400)
        _check_range("prompts", len(self.prompts), 0, MAX_PROMPTS)
        _check_range("min_tok_s", self.min_tok_s, 0, 10**6)
        _check_range("max_temp_c", self.max_temp_c, 0, 1000)
        _check_range("max_memory_mb", self.max_memory_mb, 0, 10**9)
        _check_range("soak_s", self.soak_s, 0, 7 * 86_400)


@dataclass(frozen=True)
class Release:
    """Content of release.json."""

    name: str
    version: str
    seq: int  # grows with every release of this name; a lower one is a downgrade
    manifest: FileRef
    files: tuple[FileRef, ...]  # all others
    requires: Requires = field(default_factory=Requires)
    health: Health = field(default_factory=Health)
    config: dict[str, Any] = field(default_factory=dict)  # options of the service
    deltas: tuple[DeltaRef, ...] = ()

    def __post_init__(self) -> None:
        for key in ("name", "version"):
            if not NAME.fullmatch(getattr(self, key)):
                raise ValueError(f"{key} is {getattr(self, key)!r:.80}; expected {NAME.pattern}")
        _check_range("seq", self.seq, 1, wire.MAX_INTEGER)
        _check_range("files", len(self.files), 1, MAX_FILES)
        if self.manifest.path != layout.MANIFEST:
            raise ValueError(f"manifest is {self.manifest.path!r}; expected {layout.MANIFEST}")
        paths = {file.path for file in self.files}
        if len(paths) != len(self.files) or layout.MANIFEST in paths:
            raise ValueError("files lists a path twice")
        sizes: dict[str, int] = {}
        for file in self.every_file:
            if sizes.setdefault(file.sha256, file.size) != file.size:
                raise ValueError(f"blob {file.sha256} has two sizes")
        for delta in self.deltas:
            if delta.target not in sizes:
                raise ValueError(f"a delta makes {delta.target}, which is no file")
            if delta.size >= sizes[delta.target]:
                raise ValueError(f"a delta has {delta.size} bytes, no less than what it makes")
        if len(wire.encode(self.config)) > MAX_CONFIG_BYTES:
            raise ValueError(f"config has more than {MAX_CONFIG_BYTES} bytes")

    @property
    def every_file(self) -> Iterator[FileRef]:
        """All files of the bundle, the manifest first."""
        yield self.manifest
        yield from self.files

    @property
    def blobs(self) -> dict[str, int]:
        """Size of each blob, by digest; a blob that is two files counts once."""
        return {file.sha256: file.size for file in self.every_file}

    def to_bytes(self) -> bytes:
        """The document as published."""
        return wire.encode({"schema": SCHEMA, **asdict(self)})


def parse(data: bytes) -> Release:
    """The release in a document.

    Raises:
        UpdateRefused: for anything that `Release.to_bytes` does not write.
    """
    try:
        return strict.parse(Release, data, "release", schema=SCHEMA, limit=MAX_RELEASE_BYTES)
    except strict.BadDocument as error:
        raise UpdateRefused(str(error), reason="malformed") from None


def target_path(name: str, version: str) -> str:
    """Where the repository has a release."""
    return f"bundles/{name}/{version}/release.json"


def version_key(text: str) -> tuple[int, ...]:
    """Numbers of a version, for comparing: 6.10 is later than 6.2."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:4])


def _check_blob(size: int, sha256: str) -> None:
    _check_range("size", size, 0, wire.MAX_INTEGER)
    if not SHA256.fullmatch(sha256):
        raise ValueError(f"sha256 is {sha256!r:.80}; expected 64 lower-case hex digits")


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} is {value!r}; expected {least} to {most}")
