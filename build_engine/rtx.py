# SPDX-License-Identifier: Apache-2.0
"""TensorRT-RTX from PyPI: NVIDIA's ONNX parser and builder on a machine without a GPU.

It is not the TensorRT of a Jetson, and its plans run on no Jetson. It takes the same ONNX and asks
the same plugins the same questions, so what it refuses is found before a device is at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

from edgecascade.errors import BackendUnavailable

PACKAGES = ("tensorrt_rtx_libs", "tensorrt_rtx_bindings")
LIBRARY = "libtensorrt_rtx.so"


def libraries() -> Path:
    """Where the wheel keeps its shared libraries.

    Raises:
        BackendUnavailable: when it is not installed.
    """
    spec, bindings = (find_spec(name) for name in PACKAGES)
    if spec is None or spec.origin is None or bindings is None:
        raise BackendUnavailable(
            "TensorRT-RTX is not installed: pip install '.[check]' in the clone (Linux on x86-64)"
        )
    return Path(spec.origin).parent


@contextmanager
def loader_path() -> Iterator[Path]:
    """A folder that LD_LIBRARY_PATH must name before a process that builds plugins starts.

    When the parser meets a plugin it opens "libtensorrt_rtx.so", a name that the wheel does not
    ship, and ends the process because it cannot. A link of that name to the library which is loaded
    already is all it wants.
    """
    library = next(libraries().glob(LIBRARY + ".*"))
    with TemporaryDirectory(prefix="edgecascade-rtx-") as folder:
        (Path(folder) / LIBRARY).symlink_to(library)
        yield Path(folder)


def import_rtx() -> ModuleType:
    """The module; `loader_path` must be in place."""
    libraries()
    import_module(PACKAGES[0])  # loads the libraries that the bindings link to
    return import_module(PACKAGES[1])
