# SPDX-License-Identifier: Apache-2.0
"""Model families: one file each, named by the checkpoint's `model_type`.

A family file offers `read_config(raw) -> config`, `tensors(config) -> list[Tensor]`,
`states(config) -> list[State]` and `forward(ops, config, weights)`. Adding a family is adding a
file here and its name below.

Of a config the rest of the program reads `vocab` and `max_context`, and `top_k`, the experts of a
layer that one token reads: 0 where there are none.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from edgecascade.errors import UnsupportedModel

FAMILIES = ("nemotron_h",)


def family(model_type: object) -> ModuleType:
    """The file of a family.

    Raises:
        UnsupportedModel: for a `model_type` without a file.
    """
    if model_type not in FAMILIES:
        raise UnsupportedModel(
            f"model_type is {model_type!r}; this version reads {', '.join(FAMILIES)}"
        )
    return import_module(f"edgecascade.models.{model_type}")
