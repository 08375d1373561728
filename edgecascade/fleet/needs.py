# SPDX-License-Identifier: Apache-2.0
"""The libraries for signatures and repositories come with the extra `fleet`, not with the SDK."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edgecascade.errors import FleetError


@contextmanager
def fleet_extra() -> Iterator[None]:
    """Around an import of one of them.

    Raises:
        FleetError: when it is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise FleetError(
            f"updates of a fleet need {error.name}, which is not installed: "
            "pip install '.[fleet]' in the clone",
            reason="not-installed",
        ) from error
