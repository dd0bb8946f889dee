"""
A hundred other services, through Apprise, in a process of its own.

Apprise loads 185 plug-ins, waits in threads that cannot be cancelled, and writes its addresses to logs: in a
short-lived process none of that is the daemon's. The addresses go to it by stdin.
"""

import asyncio
import base64
import json
import sys
from collections.abc import Callable
from typing import Final

from ...core.alerts.words import Message, cut
from ...credentials import Secret
from ..render import as_text, tone
from .contract import Broken, Draw, Later

TIMEOUT_S: Final = 60.0


class Apprise:
    """All addresses of one file."""

    name = "apprise"

    def __init__(self, urls: Callable[[], Secret], *, timeout_s: float = TIMEOUT_S) -> None:
        self._urls = urls
        self._timeout_s = timeout_s

    async def send(self, message: Message, root: str | None, draw: Draw) -> str | None:
        """Hand one message over to every address; one that fails fails the message, and is tried again."""
        del root
        urls = self._urls()
        picture = await draw() if message.picture else None
        request = {
            "urls": urls.reveal().split(),
            "title": message.headline,
            "body": as_text(message),
            "type": {"call": "failure", "alert": "warning", "well": "success", "info": "info"}[tone(message)],
            "picture": None if picture is None else base64.b64encode(picture).decode(),
        }
        try:
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "stepguardd.alerts.channels.apprise_process"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
        except OSError as error:
            raise Later(f"Apprise's process does not start ({error.strerror})") from None
        try:
            async with asyncio.timeout(self._timeout_s):
                out, _ = await child.communicate(json.dumps(request).encode())
        except TimeoutError:
            raise Later(f"Apprise took longer than {self._timeout_s:g} s") from None
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        word = cut(urls.hidden_in(out.decode("utf-8", "replace")), 200)
        if word == "missing":
            raise Broken("apprise is not installed; pip install 'stepguard[apprise]'")
        if word == "unreadable":
            raise Broken("Apprise cannot read one of the addresses in apprise.urls_secret; correct it")
        if word != "sent":
            raise Later(f"a service behind Apprise did not take the message (exit code {child.returncode})")
        return None
