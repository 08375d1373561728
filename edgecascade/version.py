# SPDX-License-Identifier: Apache-2.0
"""Which version of this package runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """The installed version; a source tree that was never installed has none."""
    try:
        return version("edgecascade")
    except PackageNotFoundError:
        return "not installed"
