# SPDX-License-Identifier: Apache-2.0
"""Facts about the machine that EdgeCascade runs on."""
