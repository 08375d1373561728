# SPDX-License-Identifier: Apache-2.0
"""States kept at token boundaries, so that a prompt starts where it parts from an earlier one.

A prompt is prefilled in pieces whose ends, its cuts, depend on the tokens before them and on
nothing else. States are kept at cuts only: whoever starts from one does the same arithmetic on the
same rows as whoever starts from nothing, and gets the same tokens (docs/scheduler.md).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecascade.backends.base import Snapshot
from edgecascade.text.turns import common_length

Array = NDArray[Any]
Parts = dict[tuple[int, str], Array]

MIN_PIECE_TOKENS = 32  # a shorter piece costs about as much to compute as one of this length
STRIDE_TOKENS = 1024  # a long prompt leaves a state about so often
LAST_BOUNDARIES = 2  # ends of messages whose state is kept, counted from the end of the prompt
REMEMBERED_PROMPTS = 64


@dataclass(frozen=True)
class Path:
    """A prompt, its cuts, and for each of them a key that stands for all tokens before it."""

    tokens: Array  # int32
    cuts: tuple[int, ...]
    keys: tuple[bytes, ...]

    def upto(self, cut: int) -> Path:
        """The path to one of the cuts."""
        count = self.cuts.index(cut) + 1
        return Path(self.tokens[:cut], self.cuts[:count], self.keys[:count])


@dataclass(frozen=True)
class CutRule:
    """Where prompts are cut: after a boundary token, and where a piece is full.

    A message that begins with `question` is in one piece with its answer: prompts do not part
    between the two, and the tokens that open the answer need no piece of their own.
    """

    chunk_tokens: int = 256
    boundary_ids: frozenset[int] = frozenset()  # tokens that end a message
    question: tuple[int, ...] = ()

    def cuts(self, tokens: Array) -> tuple[int, ...]:
        """Ends of the pieces of a prompt, the last one its length."""
        ends: list[int] = self.boundaries(tokens).tolist()
        cuts, start, total = [], 0, len(tokens)
        while start < total:
            limit = start + self.chunk_tokens
            after = bisect_left(ends, start + MIN_PIECE_TOKENS)
            start = ends[after] if after < len(ends) and ends[after] <= limit else limit
            cuts.append(min(start, total))
        return tuple(cuts)

    def path(self, tokens: Array) -> Path:
        """A prompt with its cuts and their keys."""
        tokens = np.ascontiguousarray(tokens, np.int32)
        cuts = self.cuts(tokens)
        keys, digest, start = [], b"", 0
        for cut in cuts:
            digest = hashlib.sha256(digest + tokens[start:cut].tobytes()).digest()
            keys.append(digest)
            start = cut
        return Path(tokens, cuts, tuple(keys))

    def boundaries(self, tokens: Array) -> Array:
        """Numbers of tokens behind which prompts part: the ends of messages but for questions."""
        ends = np.zeros(len(tokens), np.bool_)
        for token in self.boundary_ids:  # too few for a set operation to pay
            ends |= tokens == token
        after = np.flatnonzero(ends) + 1
        if not self.question:
            return after
        opened = np.flatnonzero(tokens == self.question[0])
        asks = np.ones(len(opened), np.bool_)
        for offset, token in enumerate(self.question[1:], 1):
            asks &= tokens.take(opened + offset, mode="clip") == token
        of = np.searchsorted(opened, after) - 1  # the message that each of them ends, -1 for none
        asked: Array = np.append(asks, False)[of]
        return after[~asked]


@dataclass
class _Run:
    """Keys and values of one token sequence; the states along it share them."""

    parts: Parts
    tokens: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())


@dataclass(eq=False)
class Entry:
    """A kept state. `leases` counts who is using it: it is not dropped meanwhile."""

    key: bytes
    tokens: Array
    own: Parts
    run: _Run
    leases: int = 0

    @property
    def snapshot(self) -> Snapshot:
        """The state in the form that backends read."""
        count = len(self.tokens)
        return Snapshot(
            count, {**self.own, **{k: part[:, :count] for k, part in self.run.parts.items()}}
        )

    @property
    def own_bytes(self) -> int:
        """Memory that no other entry shares."""
        return sum(part.nbytes for part in self.own.values())


@dataclass
class CacheStats:
    """What reuse was worth so far."""

    hits: int = 0
    misses: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    stored: int = 0
    dropped: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that needed no prefill."""
        return self.reused_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass
class PrefixCache:
    """Bounded in bytes; what was not used longest goes first. For one thread at a time."""

    max_bytes: int
    rule: CutRule = field(default_factory=CutRule)

    def __post_init__(self) -> None:
        self.stats = CacheStats()
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._prompts: OrderedDict[bytes, Array] = OrderedDict()  # of late, to see where they part

    @contextmanager
    def longest(self, path: Path) -> Iterator[Entry | None]:
        """The longest kept prefix that leaves at least one token to compute, leased meanwhile."""
        entry = self._last_of(path.keys[:-1])
        self.stats.prompt_tokens += len(path.tokens)
        if entry is None:
            self.stats.misses += 1
            yield None
            return
        self.stats.hits += 1
        self.stats.reused_tokens += len(entry.tokens)
        self._entries.move_to_end(entry.key)
        entry.leases += 1
        try:
            yield entry
        finally:
            entry.leases -= 1

    def find(self, path: Path) -> Entry | None:
        """The state kept at the last possible cut; nothing is counted."""
        return self._last_of(path.keys)

    def worth_keeping(self, path: Path, held: int = 0) -> frozenset[int]:
        """The cuts of a prompt, beyond the tokens `held`, at which its state should be captured.

        Another prompt is likely to begin like this one up to the end of the system prompt, of one
        of the last messages, or where an earlier prompt parted from it; in between, a state now
        and then bounds what is computed again.
        """
        tokens, inner = path.tokens, path.cuts[:-1]
        if not inner or not self.max_bytes:
            return frozenset()
        if inner[-1] <= held:  # nothing is captured: the first token need not wait for the rest
            self._remember(path)
            return frozenset()
        ends = set(self.rule.boundaries(tokens).tolist())
        boundaries = [cut for cut in inner if cut in ends]
        kept = {inner[-1], *boundaries[:1], *boundaries[-LAST_BOUNDARIES:]}
        for reach in range(STRIDE_TOKENS, len(tokens), STRIDE_TOKENS):
            kept.add(_last_up_to(inner, reach))
        for other in self._prompts.values():
            kept.add(_last_up_to(inner, common_length(tokens, other)))
        self._remember(path)
        return frozenset(cut for cut in kept if cut > held)

    def has(self, path: Path) -> bool:
        """Whether the state after the whole path is kept."""
        return path.keys[-1] in self._entries

    def put(self, path: Path, snapshot: Snapshot) -> bool:
        """Keep the state after the whole path; False when it does not fit."""
        key, tokens = path.keys[-1], path.tokens
        if key in self._entries:
            self._entries.move_to_end(key)
            return True
        own = {k: part for k, part in snapshot.parts.items() if k[1] != "kv"}
        run = _Run({k: part for k, part in snapshot.parts.items() if k[1] == "kv"}, len(tokens))
        entry = Entry(key, tokens, own, run)
        if not self._make_room(entry.own_bytes + run.nbytes, path.keys):
            return False
        for prefix in path.keys[:-1]:  # they need no keys and values of their own any more
            if prefix in self._entries:
                self._entries[prefix].run = run
        self._entries[key] = entry
        self.stats.stored += 1
        return True

    @property
    def nbytes(self) -> int:
        """Memory that the kept states occupy."""
        return self._bytes_beside(())

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Forget every state that nobody uses."""
        for entry in [e for e in self._entries.values() if not e.leases]:
            self._drop(entry)

    def _last_of(self, keys: Sequence[bytes]) -> Entry | None:
        return next((self._entries[key] for key in reversed(keys) if key in self._entries), None)

    def _make_room(self, wanted: int, keys: Collection[bytes]) -> bool:
        """Drop states until `wanted` bytes fit.

        The newcomer's prefixes, `keys`, go last: they will share with it.
        """
        if wanted > self.max_bytes:
            return False
        idle = [e for e in self._entries.values() if not e.leases]
        for entry in sorted(idle, key=lambda e: e.key in keys):
            if self._bytes_beside(keys) + wanted <= self.max_bytes:
                break
            self._drop(entry)
        return self._bytes_beside(keys) + wanted <= self.max_bytes

    def _bytes_beside(self, keys: Collection[bytes]) -> int:
        """Memory occupied once the states named by `keys` take their keys and values elsewhere."""
        entries = list(self._entries.values())  # at once: other threads ask, too
        runs = {id(entry.run): entry.run for entry in entries if entry.key not in keys}
        return sum(e.own_bytes for e in entries) + sum(run.nbytes for run in runs.values())

    def _drop(self, entry: Entry) -> None:
        del self._entries[entry.key]
        self.stats.dropped += 1
        run = entry.run
        longest = max((len(e.tokens) for e in self._entries.values() if e.run is run), default=0)
        if longest and longest < run.tokens:
            run.parts = {k: part[:, :longest].copy() for k, part in run.parts.items()}
            run.tokens = longest

    def _remember(self, path: Path) -> None:
        self._prompts[path.keys[-1]] = path.tokens
        self._prompts.move_to_end(path.keys[-1])
        if len(self._prompts) > REMEMBERED_PROMPTS:
            self._prompts.popitem(last=False)


def _last_up_to(cuts: Sequence[int], reach: int) -> int:
    return max((cut for cut in cuts if cut <= reach), default=0)
