# SPDX-License-Identifier: Apache-2.0
"""fleet relay: the repository's small files over MQTT"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgecascade.cli.rollouts import HomeOf, broker_options, operator_address
from edgecascade.errors import NetworkError

if TYPE_CHECKING:
    from edgecascade.fleet.home import Home

POLL_S = 1.0


def add(acts: Any, home_options: Callable[[argparse.ArgumentParser], None], home: HomeOf) -> None:
    """The command and its options."""
    parser = acts.add_parser("relay", help="answer agents whose repository is mqtt:, until Ctrl-C")
    home_options(parser)
    broker_options(parser)
    parser.set_defaults(run=lambda args: _relay(args, home(args)), client_id="relay")


def _relay(args: argparse.Namespace, home: Home) -> int:
    from edgecascade.fleet.relay import Relay
    from edgecascade.service.topics import DEFAULT_PREFIX

    address = operator_address(args)
    with Relay(home.served, address, args.client_id, args.prefix or DEFAULT_PREFIX) as relay:
        print(f"{home.served} at {address.shown}; Ctrl-C ends it", file=sys.stderr)
        while relay.link.fatal is None:
            threading.Event().wait(POLL_S)
        raise NetworkError(relay.link.fatal)
