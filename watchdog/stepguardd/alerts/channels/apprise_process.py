"""The process of `apprise_urls`: one JSON request on stdin, one word on stdout, nothing else anywhere."""

import base64
import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> str:
    """Send one message; the answer is sent, failed, unreadable or missing."""
    request: dict[str, Any] = json.load(sys.stdin)
    try:
        import apprise  # noqa: PLC0415 - an extra, and half a second of plug-ins
    except ModuleNotFoundError:
        return "missing"
    logging.disable(logging.CRITICAL)
    sender = apprise.Apprise()
    if not request["urls"] or not all(sender.add(url) for url in request["urls"]):
        return "unreadable"
    with tempfile.TemporaryDirectory() as folder:
        attach = None
        if request["picture"] is not None:
            picture = Path(folder) / "reward.png"
            picture.write_bytes(base64.b64decode(request["picture"]))
            attach = str(picture)
        sent = sender.notify(
            title=request["title"], body=request["body"], notify_type=request["type"], attach=attach
        )
    return "sent" if sent else "failed"


if __name__ == "__main__":
    sys.stdout.write(main())
