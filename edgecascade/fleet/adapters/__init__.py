# SPDX-License-Identifier: Apache-2.0
"""Other fleet services as carriers: they bring signed orders and take reports, and decide nothing.

Both adapters are translations without a connection: bytes in, messages out. A carrier's own cancel
is not signed, so it stops nothing; send an order with action abort.
"""
