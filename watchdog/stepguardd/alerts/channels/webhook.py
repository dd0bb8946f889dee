"""
Any service of the user's own: one JSON object by POST, signed.

    Stepguard-Delivery: night-17                      the same for the same message, also when sent again
    Stepguard-Signature: t=1790000000,v1=<hex>        HMAC-SHA256 of "<t>.<body>" with the shared key
"""

import hashlib
import hmac
from collections.abc import Callable

from ... import clock
from ...core.alerts.words import Message, cut
from ...credentials import Secret
from ...jsontext import to_json
from ..peers import Peers
from ..render import as_json
from .contract import Broken, Draw, Rejected


class Webhook:
    """One address."""

    name = "webhook"

    def __init__(
        self,
        peers: Peers,
        url: Callable[[], Secret],
        key: Callable[[], Secret] | None,
        now: Callable[[], float] = clock.wall,
    ) -> None:
        self._peers = peers
        self._url = url
        self._key = key
        self._now = now

    async def send(self, message: Message, root: str | None, draw: Draw) -> str | None:
        """Hand one object over; its `thread` says what belongs together."""
        del root, draw
        url = self._url()
        body = to_json(as_json(message)).encode("utf-8", "replace")
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "stepguard",
            "Stepguard-Delivery": f"{message.run}-{message.number}",
        }
        if self._key is not None:
            headers["Stepguard-Signature"] = signature(self._key(), body, int(self._now()))
        answer = await self._peers.request("POST", url.reveal(), headers=headers, content=body)
        answer.refuse_busy("the webhook")
        if answer.status in {400, 413, 422}:
            said = cut(url.hidden_in(answer.text), 100)
            raise Rejected(f"the webhook does not take this message ({answer.status} {said})")
        if not 200 <= answer.status < 300:
            raise Broken(f"the webhook answers {answer.status}; check webhook.url_secret")
        return None


def signature(key: Secret, body: bytes, at: int) -> str:
    """The header's value, for the receiver to compute and compare in constant time."""
    digest = hmac.new(key.reveal().encode(), f"{at}.".encode() + body, hashlib.sha256)
    return f"t={at},v1={digest.hexdigest()}"
