# SPDX-License-Identifier: Apache-2.0
"""Command whatever robot is there, and show its answer as it comes.

python examples/ask_over_mqtt.py mqtt://broker "Go to the charging dock."
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from edgecascade.client import Client

TOOLS = json.loads((Path(__file__).parent / "demo_model" / "tools.json").read_text())


def main() -> None:
    broker, command = sys.argv[1:3]
    with Client(broker) as client:
        for name, status in client.devices().items():
            print(f"{name}: {status.status}, {status.busy} of {status.slots} slots busy")
        stream = client.stream(None, command, tools=TOOLS, max_completion_tokens=200, timeout_s=30)
        for piece in stream:
            print(piece.reasoning + piece.text, end="", flush=True)
        answer = stream.answer
        print("", *answer.tool_calls, sep="\n")
        print(
            f"{answer.device}: {answer.finish_reason}, {answer.usage['completion_tokens']} tokens"
        )


if __name__ == "__main__":
    main()
