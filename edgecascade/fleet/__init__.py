# SPDX-License-Identifier: Apache-2.0
"""Updates of a fleet: signed, resumable, tested on the device, rolled back by themselves."""
