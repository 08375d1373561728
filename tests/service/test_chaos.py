# SPDX-License-Identifier: Apache-2.0
"""Whatever breaks, each request ends once, and its tokens are those of a lone run."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from proxy import Proxy
from serving import WAIT_S, Connect, Serve

from edgecascade import LLM
from edgecascade.client import Client
from edgecascade.completion import Completion
from edgecascade.errors import DeadlineExceeded
from edgecascade.service.broker import LocalBroker

PROMPTS = ("stop", "go to the dock", "turn left, then report what you see on the way " * 6)
LENGTHS = (1, 9, 40)
SEEDS = range(3)


@dataclass(frozen=True)
class Question:
    """One of a few, so that each can be asked alone first."""

    prompt: str
    length: int
    seed: int

    @property
    def parameters(self) -> dict[str, Any]:
        return {"max_completion_tokens": self.length, "seed": self.seed, "temperature": 0.9}

    def alone(self, llm: LLM) -> Completion:
        return llm.generate(
            messages=[{"role": "user", "content": self.prompt}],
            max_tokens=self.length,
            seed=self.seed,
            temperature=0.9,
        )


Alone = dict[Question, Completion]


@pytest.fixture(scope="module")
def answers(llm: LLM) -> Alone:
    """What each question gets without any company."""
    questions = [Question(p, n, s) for p in PROMPTS for n in LENGTHS for s in SEEDS]
    return {question: question.alone(llm) for question in questions}


def ask(
    client: Client, question: Question, lone: Completion, dice: random.Random, timeout_s: float
) -> str:
    """Ask in a random way, check what comes, and say how it ended."""
    tight = dice.random() < 0.05
    stream = client.stream(
        None if dice.random() < 0.5 else "dev-1",
        question.prompt,
        timeout_s=dice.uniform(0.01, 0.2) if tight else timeout_s,
        priority=dice.choice((-5, 0, 0, 5)),
        flush_ms=dice.choice((0, 5, 40)),
        **question.parameters,
    )
    leave = dice.randrange(3) if dice.random() < 0.1 else None
    shown = ""
    try:
        for index, piece in enumerate(stream):
            assert not piece.restart
            shown += piece.reasoning + piece.text
            if index == leave:
                client.cancel(stream.id)
    except DeadlineExceeded:
        if not tight:
            raise
        return "too late"
    answer = stream.answer
    assert shown == answer.reasoning + answer.text
    if answer.finish_reason in ("cancelled", "deadline"):
        assert (lone.reasoning + lone.text).startswith((answer.reasoning + answer.text).rstrip("�"))
    else:
        assert (answer.reasoning, answer.text) == (lone.reasoning, lone.text)
        assert answer.usage["completion_tokens"] == len(lone.token_ids)
    return answer.finish_reason


def load(
    connect: Callable[[str], Client],
    answers: Alone,
    *,
    clients: int,
    each: int,
    timeout_s: float = 60.0,
) -> Counter[str]:
    """Many clients, each asking one question after another."""

    def one(index: int) -> Counter[str]:
        dice = random.Random(index)
        client = connect(f"robot-{index}")
        questions = [dice.choice(list(answers)) for _ in range(each)]
        return Counter(ask(client, q, answers[q], dice, timeout_s) for q in questions)

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(one, range(clients)), Counter())


def empty(service: Any, llm: LLM) -> bool:
    """Whether nothing of any request is left."""
    core = service._core
    stats = llm._engine.stats()
    return (core.busy, stats.running, stats.waiting, stats.parked) == (0, 0, 0, 0)


def until(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if holds():
            return True
        time.sleep(0.02)
    return False


PRIVILEGED = tuple(f"robot-{index}" for index in range(20))


def test_a_thousand_requests_of_every_kind(
    serve: Serve,
    connect: Connect,
    llm: LLM,
    answers: Alone,
    mosquitto: LocalBroker,
) -> None:
    service = serve(priority_clients=PRIVILEGED)
    threads = threading.active_count()
    with ExitStack() as stack:
        wires = [stack.enter_context(Proxy(mosquitto.port)) for _ in range(5)]

        def wired(name: str) -> Client:
            index = int(name.partition("-")[2])
            url = wires[index].url if index < len(wires) else mosquitto.url
            return stack.enter_context(Client(url, client_id=name))

        over = threading.Event()

        def cut() -> None:
            dice = random.Random(0)
            while not over.wait(dice.uniform(0.5, 1.5)):
                dice.choice(wires).cut()

        cutter = threading.Thread(target=cut)
        cutter.start()
        try:
            ends = load(wired, answers, clients=20, each=50)
        finally:
            over.set()
            cutter.join()
    assert ends.total() == 1000
    assert ends["cancelled"] > 0
    assert ends["length"] + ends["stop"] > 800
    assert until(lambda: empty(service, llm))
    assert service._core._per_client == {}
    assert until(lambda: threading.active_count() <= threads)


def test_a_broker_that_is_killed_ten_times(
    serve: Serve,
    connect: Connect,
    llm: LLM,
    answers: Alone,
    mosquitto: LocalBroker,
) -> None:
    service = serve(priority_clients=PRIVILEGED)
    over = threading.Event()
    kills = 0

    def kill() -> None:
        nonlocal kills
        dice = random.Random(1)
        while kills < 10 and not over.wait(dice.uniform(0.8, 1.6)):
            mosquitto.kill()
            time.sleep(dice.uniform(0.05, 0.5))
            mosquitto.start()
            kills += 1

    killer = threading.Thread(target=kill)
    killer.start()
    ends: Counter[str] = Counter()
    try:
        while killer.is_alive():
            ends += load(connect_once(connect), answers, clients=6, each=10)
    finally:
        over.set()
        killer.join()
    assert kills == 10
    assert ends["length"] + ends["stop"] > 0.7 * ends.total()
    assert until(lambda: empty(service, llm))


def connect_once(connect: Connect) -> Callable[[str], Client]:
    """A client for each name, kept."""
    kept = connect.__dict__.setdefault("kept", {})

    def connected(name: str) -> Client:
        if name not in kept:
            kept[name] = connect(name)
        client: Client = kept[name]
        return client

    return connected


def test_a_broker_that_sleeps_ten_seconds(
    serve: Serve,
    connect: Connect,
    llm: LLM,
    answers: Alone,
    mosquitto: LocalBroker,
) -> None:
    service = serve(priority_clients=PRIVILEGED)

    def sleep() -> None:
        time.sleep(0.5)
        os.kill(mosquitto.pid, signal.SIGSTOP)
        time.sleep(10.0)
        os.kill(mosquitto.pid, signal.SIGCONT)

    sleeper = threading.Thread(target=sleep)
    sleeper.start()
    ends = load(connect, answers, clients=6, each=15)
    sleeper.join()
    assert ends.total() == 90
    assert until(lambda: empty(service, llm))
    assert service._link.counters.losses == 0
