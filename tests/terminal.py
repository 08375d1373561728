# SPDX-License-Identifier: Apache-2.0
"""Where a sentence is seen although the process ends with it: pytest keeps file 2 to itself."""

stderr = 2  # conftest.py finds the terminal's
