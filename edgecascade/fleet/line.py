# SPDX-License-Identifier: Apache-2.0
"""An agent's line to its broker: orders in, reports and status out, and questions to the service.

What a device says is signed and retained, and a broker may forget what it retains. So the latest
report of each order is kept here and told again at every connection. Only that a connection is gone
nobody can sign: that is the broker's word.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import random
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from edgecascade.fleet import reports
from edgecascade.fleet.jobs import Job, first_to_forget
from edgecascade.fleet.orders import MAX_ENVELOPE_BYTES
from edgecascade.fleet.relay import read_block
from edgecascade.fleet.settings import AgentSettings
from edgecascade.fleet.standing import HEARTBEAT_S, Standing
from edgecascade.fleet.state import MAX_VERDICTS
from edgecascade.service import wire
from edgecascade.service.mqtt import Link, LinkOptions
from edgecascade.service.protocol import Incoming
from edgecascade.service.replies import Failed, Final, Outgoing, read_reply
from edgecascade.service.topics import Topics

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

RESEND_S = 2.0  # a question that was not answered
LAST_WORDS_S = 2.0
MAX_ANSWERS = 16  # to one question, that nobody has read yet
MAX_PACKET_BYTES = 128 << 10


class Stands(Protocol):
    """How the device stands now, or as it leaves."""

    def __call__(self, *, leaving: bool = False) -> Standing:
        """With the last word's status if it is leaving."""
        ...


class Line:
    """One connection that comes back by itself. `on_order` is called on its thread."""

    def __init__(
        self,
        settings: AgentSettings,
        standing: Stands,
        on_order: Callable[[bytes], None],
        signer: Signer,
    ) -> None:
        self._topics = Topics(settings.prefix)
        self._name, self._device = settings.name, settings.device_id
        self._groups = settings.groups
        self._standing, self._on_order, self._signer = standing, on_order, signer
        self._lock = threading.Lock()  # of the reports
        self._jobs: dict[str, Job] = {}
        self._reports: dict[str, bytes] = {}  # the same, signed
        self._numbers = itertools.count(1)
        # Not all at once: devices that the same power cut ended start together.
        self._heartbeat_s = HEARTBEAT_S * random.uniform(0.8, 1.0)
        self._told: Standing | None = None
        self._told_at = 0.0
        self._pending: dict[str, queue.Queue[bytes]] = {}
        self._blocks: dict[str, queue.Queue[bytes]] = {}
        filters = self._topics.agent_filters(self._name, settings.groups)
        self._link = Link(
            LinkOptions(
                settings.address(),
                self._name,
                (*filters, self._topics.reply(self._name, self._device, "+")),
                will=self._presence(standing(leaving=True)),
                session_expiry_s=settings.session_expiry_s,
                max_packet_bytes=MAX_PACKET_BYTES,
            ),
            self._received,
            births=self._births,
        )

    @property
    def up(self) -> bool:
        """Whether it is connected."""
        return self._link.up

    @property
    def alive(self) -> bool:
        """Whether its thread turns, connected or not."""
        return self._link.alive

    @property
    def fatal(self) -> str | None:
        """Why it will not come back."""
        return self._link.fatal

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._link.start()

    def close(self) -> None:
        """Say goodbye and disconnect."""
        for message in self._words(self._standing(leaving=True)):
            self._link.publish(message)
        self._link.flush(LAST_WORDS_S)
        self._link.stop()

    def tell(self, job: Job) -> None:
        """Report; now, or once there is a connection."""
        report, dropped = reports.sign(job, self._signer), []
        with self._lock:
            self._jobs.pop(job.order, None)
            self._jobs[job.order], self._reports[job.order] = job, report
            while len(self._jobs) > MAX_VERDICTS + 1:
                dropped.append(first_to_forget(self._jobs))
                del self._jobs[dropped[-1]], self._reports[dropped[-1]]
        messages = [self._retained(job.order, report)]
        messages += [self._retained(order, b"") for order in dropped]
        if self._link.up:  # else the births say it
            for message in messages:
                self._link.publish(message)

    def tell_standing(self) -> None:
        """Say how the device stands, if that has changed or was said long ago."""
        standing, now = self._standing(), time.monotonic()
        told = replace(standing, ts=0.0)
        due = told != self._told or now - self._told_at >= self._heartbeat_s
        if due and self._link.up:
            self._told, self._told_at = told, now
            for message in self._words(standing):
                self._link.publish(message)

    def ask(self, messages: tuple[Mapping[str, Any], ...], timeout_s: float) -> dict[str, Any]:
        """Ask the service as a client; blocks. Which bundle answered, or why it was not asked."""
        if not self._link.up:
            return {"unasked": "the agent is not connected to a broker"}
        name = secrets.token_hex(8)
        body = {"id": name, "messages": list(messages), "max_completion_tokens": 8,
                "temperature": 0, "seed": 0, "timeout_s": timeout_s}  # fmt: skip
        request = Outgoing(self._topics.chat(self._device, self._name), wire.encode(body))
        answers: queue.Queue[bytes] = queue.Queue(MAX_ANSWERS)
        self._pending[name] = answers
        began, said = time.monotonic(), "no answer"
        try:
            while (taken_s := time.monotonic() - began) < timeout_s:
                self._link.publish(request)
                with contextlib.suppress(queue.Empty):
                    reply = read_reply(answers.get(timeout=RESEND_S))
                    if isinstance(reply, Final):
                        return {"bundle": reply.body.get("bundle"), "answered_s": round(taken_s, 3)}
                    if isinstance(reply, Failed):
                        said = reply.problem.code
                        if 400 <= reply.problem.status < 500 and reply.problem.status != 429:
                            return {"answered": said}  # it is there, and not for us
        finally:
            del self._pending[name]
        if not self._link.up:
            return {"unasked": "the connection to the broker was lost"}
        return {"reason": "no-answer", "message": f"{said} within {timeout_s:g} s"}

    def exchange(self, name: str, question: bytes, timeout_s: float) -> bytes | None:
        """See relay.Asker."""
        answers: queue.Queue[bytes] = queue.Queue(MAX_ANSWERS)
        self._blocks[name] = answers
        try:
            if not self._link.publish(Outgoing(self._topics.repo_get(self._name), question)):
                return None
            return answers.get(timeout=timeout_s)
        except queue.Empty:
            return None
        finally:
            del self._blocks[name]

    # The link's thread calls these.

    def _received(self, message: Incoming) -> None:
        address = self._topics.parse(message.topic)
        if address is None or not message.payload:
            return
        if address.kind in ("announce", "command"):
            if len(message.payload) <= MAX_ENVELOPE_BYTES:
                self._on_order(message.payload)
        elif address.kind == "reply" and (asked := self._pending.get(address.request)) is not None:
            _put(asked, message.payload)
        elif address.kind == "repo-rx":
            block = read_block(message.payload)
            wanted = None if block is None else self._blocks.get(block.name)
            if wanted is not None:
                _put(wanted, message.payload)

    def _births(self) -> list[Outgoing]:
        with self._lock:
            told = list(self._reports.items())
        return [*self._words(self._standing()), *(self._retained(*each) for each in told)]

    def _retained(self, order: str, report: bytes) -> Outgoing:
        return Outgoing(self._topics.job(self._name, order), report, retain=True)

    def _words(self, standing: Standing) -> list[Outgoing]:
        signed = reports.sign(replace(standing, number=next(self._numbers)), self._signer)
        topic = self._topics.standing(self._name)
        return [self._presence(standing), Outgoing(topic, signed, retain=True)]

    def _presence(self, standing: Standing) -> Outgoing:
        """Nobody believes it, but that we are gone. Clients see that an agent takes no request."""
        body = {
            "kind": "agent",
            "status": standing.status,
            "boot": standing.boot,
            "accepts": False,
            "device": self._device,
            "groups": list(self._groups),
            "ts": int(standing.ts),
        }
        return Outgoing(self._topics.status(self._name), wire.encode(body), retain=True)


def _put(answers: queue.Queue[bytes], payload: bytes) -> None:
    """Keep an answer, unless a flood of them has come: each question is asked again."""
    with contextlib.suppress(queue.Full):
        answers.put_nowait(payload)
