# SPDX-License-Identifier: Apache-2.0
"""Signing keys as files: ed25519 in PKCS#8 PEM, readable by their owner only, a password if given.

A key's file is ROLE-N.pem, so that a folder, or several memory sticks, say who can sign what.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgecascade.errors import FleetError
from edgecascade.files import fsync_folder, write_file
from edgecascade.fleet.needs import fleet_extra

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, SSlibKey
    from securesystemslib.signer import Key as PublicKey

_FILE = re.compile(r"([a-z][a-z0-9-]{0,63})-(\d{1,4})\.pem")


def public_key(raw: str) -> SSlibKey:
    """The key in 64 hex digits, with the id that signatures name it by."""
    with fleet_extra():
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from securesystemslib.signer import SSlibKey
    return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(bytes.fromhex(raw)))


def public_hex(key: PublicKey) -> str:
    """The 64 hex digits of an ed25519 key."""
    with fleet_extra():
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    text = str(key.keyval["public"])
    if not text.startswith("-----BEGIN"):
        return text
    loaded = load_pem_public_key(text.encode())
    if not isinstance(loaded, Ed25519PublicKey):
        raise FleetError(f"key {key.keyid} is of another kind; expected ed25519", reason="key")
    return loaded.public_bytes_raw().hex()


class Key(NamedTuple):
    """A private key and its file."""

    signer: CryptoSigner
    path: Path

    @property
    def keyid(self) -> str:
        """The id that metadata and envelopes name it by."""
        return str(self.signer.public_key.keyid)

    @property
    def public(self) -> str:
        """64 hex digits."""
        return public_hex(self.signer.public_key)


class KeyFolders:
    """The private keys that are at hand: those in some folders."""

    def __init__(self, folders: Sequence[str | Path], password: str | None = None) -> None:
        self.folders = [Path(folder) for folder in folders]
        self._password = password.encode() if password else None

    def keys(self, role: str) -> list[Key]:
        """All keys of a role that are at hand.

        Raises:
            FleetError: for one that others can read, that is damaged, or has another password.
        """
        found = []
        for folder in self.folders:
            for path in sorted(folder.glob(f"{role}-*.pem")):
                match = _FILE.fullmatch(path.name)
                if match and match[1] == role:
                    found.append(Key(self._load(path), path))
        return found

    def generate(self, role: str) -> Key:
        """Make a key in the first folder."""
        with fleet_extra():
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
            from securesystemslib.signer import CryptoSigner
        folder = self.folders[0]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        taken = [
            int(match[2])
            for path in folder.iterdir()
            if (match := _FILE.fullmatch(path.name)) and match[1] == role
        ]
        path = folder / f"{role}-{max(taken, default=0) + 1}.pem"
        private = Ed25519PrivateKey.generate()
        self._write(path, private)
        return Key(CryptoSigner(private), path)

    def _write(self, path: Path, private: object) -> None:
        from cryptography.hazmat.primitives.serialization import (
            BestAvailableEncryption,
            Encoding,
            NoEncryption,
            PrivateFormat,
        )

        how = BestAvailableEncryption(self._password) if self._password else NoEncryption()
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)  # type: ignore[attr-defined]
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)  # of a writer that was killed
        try:
            write_file(part, pem, mode=0o600)
            os.link(part, path)  # never over another key
        except OSError as error:
            error.filename = error.filename or str(path)  # a full disk does not say which
            raise
        finally:
            part.unlink(missing_ok=True)
        fsync_folder(path.parent)

    def _load(self, path: Path) -> CryptoSigner:
        with fleet_extra():
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
            from cryptography.hazmat.primitives.serialization import load_pem_private_key
            from securesystemslib.signer import CryptoSigner
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            raise FleetError(
                f"{path} can be read by others (mode {mode:o}); chmod 600 {path}",
                reason="key-readable",
            )
        data = path.read_bytes()
        locked = b"ENCRYPTED PRIVATE KEY" in data
        try:
            private = load_pem_private_key(data, self._password if locked else None)
        except (ValueError, TypeError) as error:
            advice = "give its password" if locked else "restore it from a copy"
            raise FleetError(f"cannot read key {path}: {error}; {advice}", reason="key") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise FleetError(f"{path} holds another kind of key; expected ed25519", reason="key")
        return CryptoSigner(private)
