# SPDX-License-Identifier: Apache-2.0
"""TLS to a broker: whom a connection trusts, and in words why it was refused."""

from __future__ import annotations

import contextlib
import ssl
from typing import Any

from edgecascade.errors import NetworkError
from edgecascade.service.config import BrokerAddress


class SecureSocket(ssl.SSLSocket):
    """Remembers the alert that it ended with: in TLS 1.3 a certificate is refused after the
    handshake, where paho only logs it.
    """

    alert: ssl.SSLError | None = None

    def recv(self, *args: Any, **options: Any) -> bytes:
        """See socket."""
        try:
            return super().recv(*args, **options)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, ssl.SSLEOFError):
            raise
        except ssl.SSLError as error:
            self.alert = error
            raise

    def send(self, *args: Any, **options: Any) -> int:
        """See socket. What the other side has closed may still hold its alert."""
        try:
            return super().send(*args, **options)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except OSError:
            with contextlib.suppress(OSError):
                self.recv(1)
            raise


def tls_context(address: BrokerAddress) -> ssl.SSLContext:
    """Whom to trust and whom to be; made for each connection: certificates are renewed.

    Raises:
        NetworkError: for files that cannot be used.
    """
    try:
        context = ssl.create_default_context(
            cafile=str(address.ca_file) if address.ca_file else None
        )
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.sslsocket_class = SecureSocket
        if address.cert_file is not None:
            context.load_cert_chain(str(address.cert_file), str(address.key_file))
    except (OSError, ssl.SSLError) as error:
        raise NetworkError(f"the certificates cannot be used: {error}") from error
    return context


def untrusted(error: ssl.SSLError) -> str:
    """Why TLS failed, and the way out."""
    if isinstance(error, ssl.SSLCertVerificationError):
        said = error.verify_message
        return f"the broker's certificate is not trusted: {said}; give what vouches for it as ca"
    said = (error.reason or str(error)).replace("_", " ").lower()
    return f"the TLS handshake fails: {said}; check the port, and the client certificate"
