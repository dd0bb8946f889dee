"""
Slack, by an incoming webhook or as a bot.

The bot keeps an incident in one thread. The curve is uploaded in three calls (files.getUploadURLExternal, the
bytes, files.completeUploadExternal); in an answer the words are the upload's comment, both are one message.
"""

import json
from collections.abc import Callable, Mapping
from typing import Final
from urllib.parse import urlencode, urlsplit

from ...core.alerts.words import Message, cut
from ...credentials import Secret
from ..peers import Peers, is_plain
from ..render import as_blocks, as_mrkdwn
from .contract import Broken, Draw, Later, Rejected

_JSON: Final = {"Content-Type": "application/json; charset=utf-8"}
_BUSY = frozenset({"ratelimited", "rate_limited", "internal_error", "fatal_error", "service_unavailable"})
_REMEDIES = {
    "not_in_channel": "invite the bot: /invite @stepguard in that channel",
    "channel_not_found": "slack.channel must be the channel's id, and the bot a member",
    "is_archived": "the channel is archived; choose another slack.channel",
    "missing_scope": "give the bot the scopes chat:write and files:write, and install it anew",
    "invalid_auth": "the token is wrong; write a new one into slack.token_secret",
    "not_authed": "the token is wrong; write a new one into slack.token_secret",
    "token_revoked": "the token was revoked; write a new one into slack.token_secret",
    "token_expired": "the token has expired; write a new one into slack.token_secret",
    "account_inactive": "the bot was removed; install it anew",
}


class SlackWebhook:
    """An incoming webhook: every message stands alone."""

    name = "slack"

    def __init__(self, peers: Peers, url: Callable[[], Secret]) -> None:
        self._peers = peers
        self._url = url

    async def send(self, message: Message, root: str | None, draw: Draw) -> str | None:
        """Hand one message over; a webhook takes no picture and gives no receipt."""
        del root, draw
        url = self._url()
        body = {"text": as_mrkdwn(message), "blocks": as_blocks(message), **_PLAIN}
        answer = await self._peers.request("POST", url.reveal(), headers=_JSON, content=_encoded(body))
        answer.refuse_busy("Slack")
        if answer.status != 200:
            said = cut(url.hidden_in(answer.text), 80)
            if answer.status == 400 and said.startswith(("invalid_", "no_text", "too_many")):
                raise Rejected(f"Slack does not take this message: {said}")
            raise Broken(
                f"Slack refuses the webhook ({answer.status} {said}); make a new one and write its address "
                "into slack.webhook_secret"
            )
        return None


class SlackBot:
    """A bot: one thread for an incident, its curve in it."""

    name = "slack"

    def __init__(self, peers: Peers, token: Callable[[], Secret], channel: str, api_url: str) -> None:
        self._peers = peers
        self._token = token
        self._channel = channel
        self._api_url = api_url

    async def send(self, message: Message, root: str | None, draw: Draw) -> str | None:
        """Hand one message over; the receipt is its timestamp, which is Slack's name for it."""
        token = self._token()
        if not is_plain(token.reveal()):
            raise Broken("what stands in slack.token_secret is no token; write it anew, on one line")
        if message.picture and root is not None:
            picture = await draw()
            if picture is not None and await self._uploaded(
                token, message, root, picture, as_mrkdwn(message)
            ):
                return root
        body: dict[str, object] = {
            "channel": self._channel, "text": message.headline, "blocks": as_blocks(message), **_PLAIN
        }  # fmt: skip
        if root is not None:
            body["thread_ts"] = root
        ts = str((await self._call(token, "chat.postMessage", body)).get("ts") or "")
        if message.picture and root is None and ts:
            picture = await draw()
            if picture is not None:
                await self._uploaded(token, message, ts, picture, None)
        return root or ts or None

    async def _uploaded(
        self, token: Secret, message: Message, thread: str, picture: bytes, comment: str | None
    ) -> bool:
        """The picture in the thread; a False leaves the words to be sent without it."""
        try:
            form = {"filename": f"{message.run}.png", "length": str(len(picture))}
            place = await self._call(token, "files.getUploadURLExternal", form, form=True)
            where = str(place.get("upload_url") or "")
            if not self._may_upload_to(where):
                return False
            answer = await self._peers.request(
                "POST", where, headers={"Content-Type": "application/octet-stream"}, content=picture
            )
            if answer.status != 200:
                return False
            title = f"The reward of {message.run}"
            body: dict[str, object] = {
                "files": [{"id": str(place.get("file_id")), "title": title}],
                "channel_id": self._channel,
                "thread_ts": thread,
            }
            if comment is not None:
                body["initial_comment"] = comment
        except (Later, Broken, Rejected):
            return False
        # From here on a failure is the message's own: it may have arrived.
        try:
            await self._call(token, "files.completeUploadExternal", body)
        except (Broken, Rejected):
            return False
        except Later:
            if comment is None:
                return False
            raise
        return True

    def _may_upload_to(self, url: str) -> bool:
        """The address comes from the peer: it must be Slack's, or the very host that gave it."""
        host = urlsplit(url).hostname or ""
        return host == urlsplit(self._api_url).hostname or host == "slack.com" or host.endswith(".slack.com")

    async def _call(
        self, token: Secret, method: str, body: Mapping[str, object], *, form: bool = False
    ) -> Mapping[str, object]:
        headers = {"Authorization": f"Bearer {token.reveal()}"}
        headers |= {"Content-Type": "application/x-www-form-urlencoded"} if form else _JSON
        content = urlencode(body).encode() if form else _encoded(body)
        url = f"{self._api_url}/{method}"
        answer = await self._peers.request("POST", url, headers=headers, content=content)
        answer.refuse_busy("Slack")
        try:
            said = json.loads(answer.text)
        except ValueError:
            said = None
        if answer.status != 200 or not isinstance(said, dict):
            raise Broken(f"Slack's interface answered {answer.status} without sense; is slack.api_url right?")
        if said.get("ok") is True:
            return said
        error = cut(token.hidden_in(str(said.get("error") or "unknown_error")), 60)
        if error in _BUSY:
            raise Later(f"Slack says {error}", answer.retry_after_s)
        if error in _REMEDIES:
            raise Broken(f"Slack says {error}; {_REMEDIES[error]}")
        raise Rejected(f"Slack does not take this message: {error}")


_PLAIN: Final = {"unfurl_links": False, "unfurl_media": False, "link_names": False}


def _encoded(body: Mapping[str, object]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
