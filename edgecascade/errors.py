# SPDX-License-Identifier: Apache-2.0
"""Everything EdgeCascade raises on purpose.

    EdgeCascadeError
    ├── InvalidRequest        asked for what cannot be                  "invalid-request"
    │   ├── ContextExceeded   prompt and answer do not fit the context  "context-exceeded"
    │   └── SuiteError        a suite of prompts that breaks its format "suite-invalid"
    ├── UnsupportedModel      a checkpoint not implemented here         "unsupported-model"
    ├── CheckpointError       a damaged or incomplete checkpoint        "checkpoint-damaged"
    ├── BundleError           a damaged or incomplete bundle            "bundle-damaged"
    │   └── BundleMismatch    a sound bundle, made for something else   "bundle-mismatch"
    ├── BuildError            the build itself could not go on          "build-failed"
    ├── SnapshotError         a damaged or incomplete saved state       "snapshot-damaged"
    ├── Overloaded            the queue is full; come back later        "overloaded"
    ├── DeadlineExceeded      time was up before it was done            "deadline-exceeded"
    ├── Cancelled             the caller took the request back          "cancelled"
    ├── NetworkError          a broker or device that is out of reach   "network-failed"
    ├── FleetError            a fleet's repository, keys or order       "fleet-failed"
    │   ├── UpdateRefused     not signed, not current or not for here   "update-refused"
    │   ├── ReportRefused     a report that no enrolled device signed   "report-refused"
    │   └── UpdateFailed      an update that could not be completed     "update-failed"
    │       └── DownloadFailed  no mirror gave a file of it               "download-failed"
    ├── RemoteError           a device that answered with an error      "remote-error"
    └── BackendError          a device or library failed                "backend-failed"
        ├── BackendUnavailable  a backend that this machine lacks         "backend-unavailable"
        └── OutOfMemory       bundle or state do not fit in memory      "out-of-memory"

A message says what happened, with the values that show it, and what to do. `code` is
stable: programs branch on it.
"""

from __future__ import annotations


class EdgeCascadeError(Exception):
    """Root of the tree; `code` is a stable kebab-case word for programs."""

    code = "error"


class InvalidRequest(EdgeCascadeError, ValueError):
    """The caller's arguments cannot be honoured."""

    code = "invalid-request"


class ContextExceeded(InvalidRequest):
    """The tokens asked for do not fit the context."""

    code = "context-exceeded"


class SuiteError(InvalidRequest):
    """A suite is not there, or breaks its format; the message has file and line."""

    code = "suite-invalid"


class UnsupportedModel(EdgeCascadeError):
    """The checkpoint needs maths that this version does not implement."""

    code = "unsupported-model"


class CheckpointError(EdgeCascadeError):
    """The checkpoint is damaged, incomplete or contradicts itself."""

    code = "checkpoint-damaged"


class BundleError(EdgeCascadeError):
    """The bundle is damaged, incomplete or contradicts itself."""

    code = "bundle-damaged"


class BundleMismatch(BundleError):
    """The bundle is sound, but made for another version, device or model."""

    code = "bundle-mismatch"


class BuildError(EdgeCascadeError):
    """The build could not go on."""

    code = "build-failed"


class SnapshotError(EdgeCascadeError):
    """A saved state is damaged or incomplete."""

    code = "snapshot-damaged"


class Overloaded(EdgeCascadeError):
    """No room in the queue; `retry_after_s` says when to try again."""

    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(EdgeCascadeError):
    """The request's time was up before it was done."""

    code = "deadline-exceeded"


class Cancelled(EdgeCascadeError):
    """The caller took the request back."""

    code = "cancelled"


class NetworkError(EdgeCascadeError):
    """A broker or a device cannot be reached."""

    code = "network-failed"


class FleetError(EdgeCascadeError):
    """A repository, a key or an order cannot be used; `reason` is one word for programs."""

    code = "fleet-failed"

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or self.code


class UpdateRefused(FleetError):
    """An order or a bundle is not what its operators signed, not current, or not for this device.

    Trying it again changes nothing.
    """

    code = "update-refused"


class ReportRefused(FleetError):
    """A report is not the word of an enrolled device about this rollout; it counts for nothing."""

    code = "report-refused"


class UpdateFailed(FleetError):
    """An update could not be completed; the device stays on what it has."""

    code = "update-failed"


class DownloadFailed(UpdateFailed):
    """No mirror gave a file; `mirrors` says what each one did.

    `final`: each of them answered, and each answer was wrong. Asking again would not help.
    """

    code = "download-failed"

    def __init__(
        self, message: str, *, reason: str, mirrors: dict[str, str], final: bool = False
    ) -> None:
        super().__init__(message, reason=reason)
        self.mirrors = mirrors
        self.final = final


class RemoteError(EdgeCascadeError):
    """A device answered a request with an error; `status` is as in HTTP, `reason` its own code."""

    code = "remote-error"

    def __init__(self, message: str, *, status: int, reason: str, param: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.param = param


class BackendError(EdgeCascadeError):
    """A device or the kernel library failed."""

    code = "backend-failed"


class BackendUnavailable(BackendError):
    """This machine or this installation lacks the backend."""

    code = "backend-unavailable"


class OutOfMemory(BackendError):
    """The bundle, or the state asked for beside it, does not fit in memory."""

    code = "out-of-memory"
