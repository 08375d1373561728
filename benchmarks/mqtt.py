# SPDX-License-Identifier: Apache-2.0
"""What MQTT costs on loopback: round trip over generate, delay of a stream, CPU of the service.

python benchmarks/mqtt.py BUNDLE [--repeats 200] [--json]

The share of a core wants streams that last, or it is that of their beginning and end: a bundle of
random weights, as examples/tiny's, does not stop by itself; a trained one answers in a few tokens,
and no share is given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgecascade import LLM
from edgecascade.client import Client
from edgecascade.service.broker import LocalBroker
from edgecascade.service.config import ServiceConfig
from edgecascade.service.service import Service

ASK = [{"role": "user", "content": "go to the dock"}]
STREAMS = 8
FLUSH_MS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=3000, help="of each of the 8 streams")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with (
        LLM.load(args.bundle, slots=STREAMS) as llm,
        LocalBroker() as broker,
        tempfile.TemporaryDirectory() as folder,
    ):
        config = ServiceConfig(
            mqtt=broker.url, device_id="bench", state_dir=folder, flush_ms=FLUSH_MS
        )
        with Service(llm, config) as service, Client(broker.url) as client:
            runner = threading.Thread(target=service.run, name="service")
            runner.start()
            try:
                service.wait_ready(10)
                result = {
                    **round_trip(llm, client, args.repeats),
                    **stream_delay(llm, client, args.repeats // 10),
                    **cpu_of_streams(client, args.tokens),
                }
            finally:
                service.stop()
                runner.join()
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        for name, value in result.items():
            print(f"{name:32s} {value:10.3f}")


def round_trip(llm: LLM, client: Client, repeats: int) -> dict[str, float]:
    """One token, asked both ways in turn, so that both see the same machine."""
    over, bare = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        client.chat("bench", ASK, max_completion_tokens=1, temperature=0)
        middle = time.perf_counter()
        llm.generate(messages=ASK, max_tokens=1, temperature=0)
        over.append(middle - start)
        bare.append(time.perf_counter() - middle)
    return {
        "generate_p50_ms": 1000 * statistics.median(bare),
        "mqtt_p50_ms": 1000 * statistics.median(over),
        "overhead_p50_ms": 1000 * statistics.median(a - b for a, b in zip(over, bare, strict=True)),
    }


def stream_delay(llm: LLM, client: Client, repeats: int) -> dict[str, float]:
    """When the last piece of a stream is shown, against the bare stream."""
    over, bare, first_over, first_bare = [], [], [], []
    for _ in range(repeats):
        start = time.perf_counter()
        pieces = iter(client.stream("bench", ASK, max_completion_tokens=64, temperature=0))
        next(pieces)
        first_over.append(time.perf_counter() - start)
        for _ in pieces:
            pass
        over.append(time.perf_counter() - start)
        start = time.perf_counter()
        bare_pieces = iter(llm.stream(messages=ASK, max_tokens=64, temperature=0))
        next(piece for piece in bare_pieces if piece.text or piece.reasoning)
        first_bare.append(time.perf_counter() - start)
        for _ in bare_pieces:
            pass
        bare.append(time.perf_counter() - start)
    return {
        "stream_first_overhead_ms": 1000
        * (statistics.median(first_over) - statistics.median(first_bare)),
        "stream_last_overhead_ms": 1000 * (statistics.median(over) - statistics.median(bare)),
        "flush_ms": float(FLUSH_MS),
    }


def cpu_of_streams(client: Client, tokens: int) -> dict[str, float]:
    """Share of one core that the service's threads take while all eight streams run."""
    threads = {
        name: tid
        for thread in threading.enumerate()
        if (name := thread.name) in ("service", "mqtt-bench") and (tid := thread.native_id)
    }
    marks: list[tuple[float, float]] = []

    def mark() -> None:
        marks.append((time.perf_counter(), sum(map(_cpu_s, threads.values()))))

    all_run = threading.Barrier(STREAMS, mark)

    def one(index: int) -> int:
        stream = client.stream(
            "bench", ASK, max_completion_tokens=tokens, temperature=0, seed=index, timeout_s=600
        )
        for number, _ in enumerate(stream):
            if number == 0:
                all_run.wait()
        return stream.answer.usage["completion_tokens"]

    with ThreadPoolExecutor(STREAMS) as pool:
        made = sum(pool.map(one, range(STREAMS)))
    mark()
    (started, cpu_before), (ended, cpu_after) = marks
    if made < STREAMS * tokens:
        return {"streams_that_stopped_after_tokens": made / STREAMS}
    return {
        "streams_tokens_per_s": made / (ended - started),
        "streams_s": ended - started,
        "service_share_of_a_core": (cpu_after - cpu_before) / (ended - started),
        "service_us_per_token": 1e6 * (cpu_after - cpu_before) / made,
    }


def _cpu_s(tid: int) -> float:
    return int(Path(f"/proc/self/task/{tid}/schedstat").read_text().split()[0]) / 1e9


if __name__ == "__main__":
    main()
