# SPDX-License-Identifier: Apache-2.0
"""Ask whatever device is there, and show the answer as it comes.

python examples/ask_over_mqtt.py mqtt://broker "Where is the dock?"
"""

from __future__ import annotations

import sys

from edgecascade.client import Client


def main() -> None:
    broker, question = sys.argv[1:3]
    with Client(broker) as client:
        for name, status in client.devices().items():
            print(f"{name}: {status.status}, {status.busy} of {status.slots} slots busy")
        stream = client.stream(None, question, max_completion_tokens=64, timeout_s=30)
        for piece in stream:
            print(piece.text, end="", flush=True)
        answer = stream.answer
        print(
            f"\n{answer.device}: {answer.finish_reason}, {answer.usage['completion_tokens']} tokens"
        )


if __name__ == "__main__":
    main()
