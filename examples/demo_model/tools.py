# SPDX-License-Identifier: Apache-2.0
"""The demo robot's tools, as OpenAI's API describes them."""

from __future__ import annotations

from typing import Any

from phrases import COLORS, STATUS

TEXT = {"type": "string"}


def one_of(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


def tool(name: str, description: str, optional: tuple[str, ...] = (), **properties: Any) -> Any:
    # "from" is a word of Python: a trailing underscore is dropped.
    named = {key.rstrip("_"): value for key, value in properties.items()}
    parameters = {
        "type": "object",
        "properties": named,
        "required": [key for key in named if key not in optional],
        "additionalProperties": False,
    }
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


POSITIVE = {"type": "number", "exclusiveMinimum": 0}
TOOLS = [
    tool(
        "move",
        "Drive straight, in metres.",
        direction=one_of("forward", "backward", "left", "right"),
        distance=POSITIVE,
    ),
    tool(
        "turn",
        "Turn on the spot, in degrees.",
        direction=one_of("left", "right"),
        angle=POSITIVE,
    ),
    tool("go_to", "Drive to a named place.", place=TEXT),
    tool("pick", "Pick up an object.", ("from",), object=TEXT, from_=TEXT),
    tool("put", "Put an object down.", object=TEXT, on=TEXT),
    tool("deliver", "Bring an object to a person or a place.", object=TEXT, to=TEXT),
    tool("find", "Look for an object.", object=TEXT),
    tool("gripper", "Open or close the gripper.", action=one_of("open", "close")),
    tool(
        "light",
        "Switch the light, if wanted in a colour.",
        ("color",),
        state=one_of("on", "off"),
        color=one_of(*COLORS),
    ),
    tool("say", "Say a text, if wanted to somebody.", ("to",), text=TEXT, to=TEXT),
    tool("wait", "Do nothing for a time.", seconds=POSITIVE),
    tool("photo", "Take a photo.", target=TEXT),
    tool("follow", "Follow a person.", target=TEXT),
    tool("set_speed", "Set the driving speed, in metres per second.", speed=POSITIVE),
    tool("dock", "Drive to the dock and charge."),
    tool("stop", "Stop at once."),
    tool("get_state", "Read a value of the robot's state.", item=one_of(*STATUS)),
]
