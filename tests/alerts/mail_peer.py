"""A mail server on loopback: STARTTLS or TLS from the first byte, a login, and failures as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import email
import ssl
from collections import deque
from collections.abc import Iterator
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from typing import Any, Literal

import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from grpo.server_process import free_port

USER, PASSWORD = "stepguard", "planted-mail-password-51d0"


class MailPeer:
    """`replies` are said to the next mails in place of 250."""

    def __init__(self, ca: trustme.CA, security: Literal["starttls", "tls"]) -> None:
        self.mails: list[EmailMessage] = []
        self.replies: deque[str] = deque()
        self.tries = 0
        self.security = security
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        ca.issue_cert("127.0.0.1", "localhost").configure_cert(context)
        self.port = free_port()
        tls: dict[str, Any] = {"tls_context": context, "require_starttls": True}
        if security == "tls":
            tls = {"ssl_context": context, "auth_require_tls": False}
        self._controller = Controller(
            self, hostname="127.0.0.1", port=self.port, authenticator=self._authenticate, **tls
        )
        self._controller.start()

    def _authenticate(
        self, server: SMTP, session: Session, envelope: Envelope, mechanism: str, data: Any
    ) -> AuthResult:
        del server, session, envelope, mechanism
        known = isinstance(data, LoginPassword) and data.password == PASSWORD.encode()
        return AuthResult(success=known, handled=False)

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        """Take a mail, of somebody who has logged in."""
        del server
        self.tries += 1
        if not session.authenticated:
            return "530 log in first"
        if self.replies:
            return self.replies.popleft()
        assert isinstance(envelope.content, bytes)
        mail = email.message_from_bytes(envelope.content, policy=default)
        assert isinstance(mail, EmailMessage)
        self.mails.append(mail)
        return "250 OK"

    def close(self) -> None:
        self._controller.stop()


async def parted() -> None:
    """TLS says goodbye after the mail: a loop that ends before warns of an open socket."""
    await asyncio.sleep(0.1)


@contextlib.contextmanager
def mail_peer(ca: trustme.CA, security: Literal["starttls", "tls"], ca_file: Path) -> Iterator[MailPeer]:
    ca.cert_pem.write_to_path(ca_file)
    peer = MailPeer(ca, security)
    try:
        yield peer
    finally:
        peer.close()
