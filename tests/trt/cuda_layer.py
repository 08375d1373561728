# SPDX-License-Identifier: Apache-2.0
"""The small layer over CUDA's driver, on the stand-in for it.

python tests/trt/cuda_layer.py FOLDER ctypes|pycuda     one line of JSON: what was seen
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import standin

FOLDER, LAYER = Path(sys.argv[1]), sys.argv[2]


def said(work: Any) -> str:
    """The error that some work ends in."""
    from edgecascade.errors import EdgeCascadeError

    try:
        work()
    except EdgeCascadeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main() -> dict[str, Any]:
    driver = ctypes.CDLL(str(FOLDER / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    driver.fakecuda_strict(1)
    if LAYER == "pycuda":
        standin.load_rest_for_pycuda(FOLDER)
    else:
        sys.modules["pycuda"] = None  # type: ignore[assignment]
    from edgecascade.backends import _cuda
    from edgecascade.backends._cuda import open_device

    device = open_device()
    stream, host = device.stream(), device.host((3, 5), np.int32)
    seen: dict[str, Any] = {"layer": type(device).__name__, "sm": device.sm, "name": device.name}
    seen["zeroed"] = not host.any()
    one, two = device.alloc(host.nbytes), device.alloc(host.nbytes)
    host[...] = np.arange(15).reshape(3, 5)
    device.upload(one, host, stream)
    device.copy(two, one, host.nbytes, stream)
    device.zero(two, 20, stream)
    back = np.empty_like(host)
    device.download(back, two, stream)
    device.synchronize(stream)
    seen["copied"] = bool(not back[0].any() and np.array_equal(back[1:], host[1:]))

    graph = device.capture(stream, lambda: device.copy(two, one, host.nbytes, stream))
    device.download(back, two, stream)
    seen["capture_does_nothing"] = not back[0].any()
    graph.launch(stream)
    device.download(back, two, stream)
    seen["launch_does_it"] = bool(np.array_equal(back, host))
    graph.close()

    seen["waits"] = said(lambda: device.capture(stream, lambda: device.synchronize(stream)))
    seen["allocates"] = said(lambda: device.capture(stream, lambda: device.alloc(8)))
    seen["again"] = said(lambda: device.synchronize(stream))
    seen["too_much"] = said(lambda: device.alloc(1 << 45))
    elsewhere: list[str] = []
    thread = threading.Thread(
        target=lambda: elsewhere.extend(
            [
                said(lambda: device.synchronize(stream)),
                said(device.use),
                said(lambda: device.alloc(8)),
            ]
        )
    )
    thread.start()
    thread.join()
    seen["thread"] = elsewhere
    before = device.available_bytes
    device.close()
    seen["freed"] = device.available_bytes > before
    driver.fakecuda_integrate()
    _cuda.memory_bytes = lambda: 1234
    seen["shared"] = device.available_bytes
    return seen


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main()) + "\n")
