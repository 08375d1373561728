# SPDX-License-Identifier: Apache-2.0
"""What waits to be read: in turn, in order, bounded."""

from __future__ import annotations

from edgecascade.service.inbox import (
    MAX_BYTES,
    MAX_BYTES_OF_ONE,
    MAX_OF_ONE,
    MAX_WAITING,
    Inbox,
)
from edgecascade.service.protocol import Incoming


def put(inbox: Inbox, client: str, number: int, verb: str = "chat") -> None:
    inbox.put(Incoming(f"edgecascade/v1/d/dev-1/{verb}/{client}", b"%d" % number), float(number))


def taken(inbox: Inbox) -> tuple[str, int]:
    arrived = inbox.take()
    assert arrived is not None
    message, now = arrived
    assert float(message.payload) == now
    return message.topic.rpartition("/")[2], int(message.payload)


def test_clients_take_turns_and_each_keeps_its_order() -> None:
    inbox = Inbox()
    for number in range(4):
        put(inbox, "flood", number)
    put(inbox, "calm", 4)
    put(inbox, "calm", 5, "cancel")
    assert [taken(inbox) for _ in range(6)] == [
        ("flood", 0),
        ("calm", 4),
        ("flood", 1),
        ("calm", 5),
        ("flood", 2),
        ("flood", 3),
    ]
    assert inbox.take() is None
    assert len(inbox) == 0


def test_a_client_that_floods_loses_its_own_messages() -> None:
    inbox = Inbox()
    for number in range(MAX_OF_ONE + 10):
        put(inbox, "flood", number)
    assert (len(inbox), inbox.lost) == (MAX_OF_ONE, 10)
    put(inbox, "calm", 7)
    assert inbox.lost == 10
    assert taken(inbox) == ("flood", 0)
    assert taken(inbox) == ("calm", 7)


def test_last_wills_wait_in_their_client_s_line() -> None:
    inbox = Inbox()
    for number in range(MAX_OF_ONE):
        inbox.put(Incoming("edgecascade/v1/c/flood/status", b"{}"), float(number))
    inbox.put(Incoming("edgecascade/v1/c/calm/status", b"7"), 7.0)
    put(inbox, "flood", 8)
    assert inbox.lost == 1
    inbox.take()
    assert inbox.take() == (Incoming("edgecascade/v1/c/calm/status", b"7"), 7.0)


def test_large_messages_are_bounded_by_their_bytes() -> None:
    inbox, size = Inbox(), 96 << 10
    large = b"x" * size
    for client in range(8):
        for _ in range(200):
            topic = f"edgecascade/v1/d/dev-1/chat/client-{client}"
            inbox.put(Incoming(topic, large[: size // 2], correlation=large[size // 2 :]), 0.0)
    assert len(inbox) == MAX_BYTES // size
    inbox.put(Incoming("edgecascade/v1/d/dev-1/chat/calm", b"{}"), 0.0)
    assert len(inbox) == MAX_BYTES // size + 1
    waiting = 0
    while arrived := inbox.take():
        waiting += arrived[0].topic.endswith("client-0")
    assert waiting == MAX_BYTES_OF_ONE // size
    assert not inbox._bytes


def test_what_is_taken_makes_room() -> None:
    inbox, size = Inbox(), 96 << 10
    message = Incoming("edgecascade/v1/d/dev-1/chat/one", b"x" * size)
    most = MAX_BYTES_OF_ONE // size
    for _ in range(most + 1):
        inbox.put(message, 0.0)
    assert (len(inbox), inbox.lost) == (most, 1)
    inbox.take()
    inbox.put(message, 0.0)
    assert (len(inbox), inbox.lost) == (most, 1)


def test_many_clients_are_bounded_together() -> None:
    inbox = Inbox()
    for number in range(MAX_WAITING + 10):
        put(inbox, f"client-{number}", number)
    assert (len(inbox), inbox.lost) == (MAX_WAITING, 10)
    for _ in range(MAX_WAITING):
        taken(inbox)
    assert inbox.take() is None
