"""
HTTP to the peers of alerts, with care for where it goes.

Secrets travel in addresses and headers, so: no redirect is followed, no proxy is taken from the environment,
TLS is asked for, and a name must lead to public addresses; the connection goes to the very address that was
looked at. Hosts in alerts.internal_hosts are excused from the last two.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx

from .channels.contract import Broken, Later

TIMEOUT_S: Final = 10.0
ANSWER_BYTES_MAX: Final = 64 * 1024
RETRY_AFTER_MAX_S: Final = 3600.0
_NO_ADDRESS: Final = "the address in the secret does not look like https://host/path; write it anew"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a peer answered, cut to what anybody needs of it."""

    status: int
    text: str
    retry_after_s: float | None

    def refuse_busy(self, who: str) -> None:
        """Raise `Later` for answers that mean: not now."""
        if self.status == 429:
            raise Later(f"{who} asks for patience (429)", self.retry_after_s)
        if self.status >= 500 or self.status == 408:
            raise Later(f"{who} is in trouble ({self.status})", self.retry_after_s)
        if 300 <= self.status < 400:
            raise Broken(f"{who} redirects ({self.status}), which is not followed; set the final address")


class Peers:
    """
    The way out.

    Args:
        internal_hosts: may be private and without TLS.
        proxy: an HTTP proxy to use for all others; it looks names up itself.
        ca_file: certificates to trust beside the machine's.
        timeout_s: for one request as a whole.

    """

    def __init__(
        self,
        *,
        internal_hosts: tuple[str, ...] = (),
        proxy: str | None = None,
        ca_file: Path | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._internal = {host.lower() for host in internal_hosts}
        self._proxy = proxy
        self._ca_file = ca_file
        self._timeout_s = timeout_s

    def is_internal(self, host: str) -> bool:
        """Whether the config names this host as one of ours."""
        return host.lower() in self._internal

    def tls(self) -> ssl.SSLContext:
        """A context that verifies; raises `Broken` where ca_file cannot be read."""
        context = ssl.create_default_context()
        if self._ca_file is not None:
            try:
                context.load_verify_locations(self._ca_file)
            except (OSError, ssl.SSLError):
                raise Broken(
                    f"alerts.ca_file: {self._ca_file} cannot be read as PEM; fix or unset it"
                ) from None
        return context

    async def checked(self, host: str, port: int) -> str:
        """
        The address to connect to, for a name that may be connected to.

        Raises:
            Later: the name is not known now.
            Broken: it leads to a private address and is not in alerts.internal_hosts.

        """
        try:
            async with asyncio.timeout(self._timeout_s):
                found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError):
            raise Later(f"the name {host} cannot be looked up") from None
        except UnicodeError:
            raise Broken(f"{host} is no name of a host; correct it") from None
        addresses = [str(entry[4][0]) for entry in found]
        for address in addresses:
            if not self.is_internal(host) and not _is_public(address):
                raise Broken(
                    f"{host} leads to {address}, which is not public; add {host} to alerts.internal_hosts if "
                    "that is meant"
                )
        return addresses[0]

    async def request(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, content: bytes = b""
    ) -> Answer:
        """
        One request, one answer.

        Raises:
            Later: no answer came.
            Broken: the address may not be asked, or its certificate is not trusted.

        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or parts.scheme not in {"http", "https"} or not is_plain(url):
            raise Broken(_NO_ADDRESS)
        if parts.scheme == "http" and not self.is_internal(host):
            raise Broken(f"{host} would be asked without TLS; use https, or add it to alerts.internal_hosts")
        sent = dict(headers or {})
        extensions: dict[str, object] = {}
        proxy = None if self.is_internal(host) else self._proxy
        try:
            target = httpx.URL(url)
        except (httpx.InvalidURL, UnicodeError):  # the latter of idna
            raise Broken(_NO_ADDRESS) from None
        if proxy is None:
            address = await self.checked(host, port or (443 if parts.scheme == "https" else 80))
            sent["Host"] = parts.netloc.rpartition("@")[2]
            target = target.copy_with(host=address)
            extensions = {"sni_hostname": host}
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                httpx.AsyncClient(
                    verify=self.tls() if parts.scheme == "https" else False,
                    trust_env=False,
                    proxy=proxy,
                    follow_redirects=False,
                    timeout=self._timeout_s,
                ) as client,
                client.stream(
                    method, target, headers=sent, content=content, extensions=extensions
                ) as response,
            ):
                raw = bytearray()
                async for chunk in response.aiter_raw():
                    raw += chunk
                    if len(raw) > ANSWER_BYTES_MAX:
                        break
        except TimeoutError:
            raise Later(f"{host} did not answer within {self._timeout_s:g} s") from None
        except (httpx.HTTPError, OSError) as error:
            cause = _certificate(error)
            if cause is not None:
                raise Broken(f"{host}: {cause}; see alerts.ca_file") from None
            raise Later(f"{host} cannot be reached ({type(error).__name__})") from None
        return Answer(
            status=response.status_code,
            text=bytes(raw[:ANSWER_BYTES_MAX]).decode("utf-8", "replace"),
            retry_after_s=_seconds(response.headers.get("retry-after")),
        )


def is_plain(text: str) -> bool:
    """ASCII that shows, without spaces: what may stand in an address or a header."""
    return text.isascii() and text.isprintable() and " " not in text


def _is_public(address: str) -> bool:
    """Global, also inside of what embeds an IPv4 address in an IPv6 one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return inner.is_global
    return ip.is_global and not ip.is_multicast


def _certificate(error: BaseException) -> str | None:
    """What is wrong with a certificate, if that is it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted ({seen.verify_message})"
        seen = seen.__cause__ or seen.__context__
    return None


def _seconds(text: str | None) -> float | None:
    if text is None or not text.strip().isdecimal():
        return None
    return min(float(text), RETRY_AFTER_MAX_S)
