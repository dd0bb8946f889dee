"""A delivery as a process of its own, to be killed: what waits in the journal goes to a webhook."""

import asyncio
import sys
from pathlib import Path

from stepguardd.alerts.channels.webhook import Webhook
from stepguardd.alerts.delivery import Delivery
from stepguardd.alerts.outbox import Outbox
from stepguardd.alerts.peers import Peers
from stepguardd.core.alerts.words import Message
from stepguardd.credentials import Secret


async def no_curve(message: Message) -> bytes | None:
    del message
    return None


async def main(journal: str, url: str) -> None:
    outbox = Outbox(Path(journal))
    await outbox.open()
    webhook = Webhook(Peers(internal_hosts=("127.0.0.1",)), lambda: Secret(url), None)
    delivery = Delivery(webhook, outbox, no_curve)
    while await delivery.step() is not None:
        pass
    await outbox.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
