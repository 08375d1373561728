# SPDX-License-Identifier: Apache-2.0
"""Finished answers, kept so that a retry gets the same final and nothing runs twice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgecascade.service import wire
from edgecascade.service.protocol import ReplyTo
from edgecascade.service.replies import Outgoing, final

MAX_ANSWERS = 4096
MAX_BYTES = 32 << 20

Key = tuple[str, str]  # client, request


@dataclass(frozen=True)
class Answer:
    """What was sent at the end of a request. Whoever asks again has a mark of his own."""

    fingerprint: bytes
    messages: tuple[Outgoing, ...]
    until: float

    @property
    def size(self) -> int:
        """Bytes it takes."""
        return sum(len(message.payload) for message in self.messages)

    def again(self, reply: ReplyTo, max_bytes: int) -> list[Outgoing]:
        """The same for whoever asks now, in parts where it no longer fits."""
        *parts, last = (replace(message, topic=reply.topic) for message in self.messages)
        last = replace(last, correlation=reply.correlation)
        if not parts and last.size > max_bytes:
            return list(final(reply, wire.decode(last.payload), max_bytes))
        return [*parts, last]

    @staticmethod
    def of(fingerprint: bytes, messages: Sequence[Outgoing], until: float) -> Answer:
        """The answer in these messages, without the mark, which may be longer than they are."""
        bare = tuple(replace(message, correlation=None) for message in messages)
        return Answer(fingerprint, bare, until)


class Answers:
    """Bounded in number and bytes; the oldest goes first."""

    def __init__(self) -> None:
        self._answers: OrderedDict[Key, Answer] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: Key, now: float) -> Answer | None:
        """The answer of a finished request, unless its time is over."""
        self._forget(now)
        return self._answers.get(key)

    def put(self, key: Key, answer: Answer, now: float) -> None:
        """Keep an answer."""
        self._drop(key)
        self._answers[key] = answer
        self._bytes += answer.size
        self._forget(now)
        while len(self._answers) > MAX_ANSWERS or self._bytes > MAX_BYTES:
            self._drop(next(iter(self._answers)))

    def _forget(self, now: float) -> None:
        # In order of arrival: one with a long deadline may keep later ones a little longer.
        while self._answers and (oldest := next(iter(self._answers.items())))[1].until < now:
            self._drop(oldest[0])

    def _drop(self, key: Key) -> None:
        if (answer := self._answers.pop(key, None)) is not None:
            self._bytes -= answer.size
