"""E-mail by SMTP: text and HTML alike, the curve inside; the mails of one incident are one thread."""

import asyncio
import ssl
from collections.abc import Callable
from email.message import EmailMessage
from email.utils import format_datetime, formataddr
from typing import Final

import aiosmtplib

from ...config.settings import EmailSettings
from ...core.alerts.words import Message, cut
from ...credentials import Secret
from ..peers import Peers
from ..render import as_html, as_mail_text, local_time, subject
from .contract import Broken, Draw, Later, Rejected

TIMEOUT_S: Final = 30.0
_PICTURE: Final = "curve"
_LOGIN_CODES: Final = frozenset({530, 534, 535, 538})  # RFC 4954, at whichever command they are said


class Email:
    """A mail server and the people behind it."""

    name = "email"

    def __init__(
        self,
        peers: Peers,
        settings: EmailSettings,
        password: Callable[[], Secret] | None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._peers = peers
        self._settings = settings
        self._password = password
        self._timeout_s = timeout_s

    async def send(self, message: Message, root: str | None, draw: Draw) -> str | None:
        """Hand one mail over; the receipt is its Message-ID, the same for the same message."""
        settings = self._settings
        assert settings.host is not None
        picture = await draw() if message.picture else None
        mail = compose(message, settings.sender or "", settings.to, root, picture)
        port = settings.port or (465 if settings.security == "tls" else 587)
        if settings.security == "none" and not self._peers.is_internal(settings.host):
            raise Broken(
                f"{settings.host} would get mail without TLS; set email.security, or add it to "
                "alerts.internal_hosts"
            )
        await self._peers.checked(settings.host, port)
        password = None if self._password is None else self._password()
        try:
            async with asyncio.timeout(self._timeout_s):
                await aiosmtplib.send(
                    mail,
                    hostname=settings.host,
                    port=port,
                    username=settings.user,
                    password=None if password is None else password.reveal(),
                    use_tls=settings.security == "tls",
                    start_tls=settings.security == "starttls",
                    tls_context=None if settings.security == "none" else self._peers.tls(),
                    timeout=self._timeout_s,
                )
        except (aiosmtplib.SMTPException, OSError, TimeoutError, ValueError) as error:
            raise _classified(error, settings, password) from None
        return str(mail["Message-ID"])


def compose(
    message: Message, sender: str, to: tuple[str, ...], root: str | None, picture: bytes | None
) -> EmailMessage:
    """The mail. Headers are set through the standard library's policy, which refuses line breaks in them."""
    mail = EmailMessage()
    domain = sender.rpartition("@")[2] or "stepguard"
    mail["Subject"] = cut(subject(message), 180)
    mail["From"] = formataddr((f"Stepguard {message.run}", sender))
    mail["To"] = ", ".join(to)
    mail["Date"] = format_datetime(local_time(message.wall))
    mail["Message-ID"] = f"<{message.run}.{message.thread}.{message.number}.{message.wall:.0f}@{domain}>"
    mail["Auto-Submitted"] = "auto-generated"
    if root is not None:
        mail["In-Reply-To"] = mail["References"] = root
    mail.set_content(as_mail_text(message))
    mail.add_alternative(as_html(message, None if picture is None else _PICTURE), subtype="html")
    if picture is not None:
        html = mail.get_payload()[1]  # type: ignore[index]
        assert isinstance(html, EmailMessage)
        html.add_related(
            picture, "image", "png", cid=f"<{_PICTURE}>", filename="reward.png", disposition="inline"
        )
    return mail


def _classified(error: Exception, settings: EmailSettings, password: Secret | None) -> Exception:
    """What a failure of SMTP means for this mail and this channel."""
    said = cut(str(error), 160)
    said = said if password is None else password.hidden_in(said)
    host = settings.host
    certificate = error.__cause__ if isinstance(error.__cause__, ssl.SSLError) else error
    if isinstance(certificate, ssl.SSLCertVerificationError):
        return Broken(
            f"{host}: its certificate is not trusted ({certificate.verify_message}); see alerts.ca_file"
        )
    if "certificate verify failed" in said.lower():
        return Broken(f"{host}: its certificate is not trusted; see alerts.ca_file")
    code = error.code if isinstance(error, aiosmtplib.SMTPResponseException) else 0
    if code in _LOGIN_CODES or isinstance(error, aiosmtplib.SMTPAuthenticationError):
        return Broken(f"{host} refuses the login ({code}); check email.user and email.password_secret")
    if isinstance(error, aiosmtplib.SMTPRecipientsRefused):
        codes = [one.code for one in error.recipients]
        if all(code >= 500 for code in codes):
            return Broken(f"{host} knows none of email.to ({codes[0]}); correct them")
        return Later(f"{host} takes no recipient now ({codes[0]})")
    if isinstance(error, aiosmtplib.SMTPSenderRefused) and error.code >= 500:
        return Broken(f"{host} refuses email.sender ({error.code}); use one that it lets send")
    if isinstance(error, aiosmtplib.SMTPNotSupported) or "STARTTLS" in said:
        return Broken(f'{host} offers no STARTTLS; use email.security = "tls", or another port')
    if code >= 500:
        return Rejected(f"{host} does not take this mail: {said}")
    if isinstance(error, TimeoutError):
        return Later(f"{host} did not answer in time")
    return Later(f"{host}: {type(error).__name__}: {said}")
