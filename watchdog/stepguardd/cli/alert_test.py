"""`stepguard alert-test`: one test message through every channel that the configuration sets."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from stepguardd import clock
from stepguardd.alerts import setup
from stepguardd.alerts.border import ANSWERS, Unforeseen, hand_over
from stepguardd.alerts.channels.contract import Channel
from stepguardd.alerts.curve import Wanted, draw
from stepguardd.cli.output import bad_news, fail, print_json
from stepguardd.config import Config, ConfigError, load_config
from stepguardd.core.alerts.words import sample

TIMEOUT_S = 90.0


def alert_test(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="The run's configuration.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Send a test message through every channel. Exit code 1 when one fails, or none is set."""
    try:
        settings = load_config(config)
    except ConfigError as wrong:
        fail(str(wrong))
    channels = [channel for channel, _ in setup.channels(settings, setup.peers(settings))]
    if not channels:
        if json:
            print_json({"channels": []})
        bad_news("no channel is set: [slack], [email], [webhook] or [apprise]; see docs/alerts.md")
    found = asyncio.run(tried(channels, settings))
    if json:
        print_json({"channels": found})
    else:
        for one in found:
            said = "ok" if one["ok"] else f"failed: {one['error']}"
            typer.echo(f"{one['channel']}: {said}")
    if not all(one["ok"] for one in found):
        raise typer.Exit(1)


async def tried(
    channels: Sequence[Channel], config: Config, timeout_s: float = TIMEOUT_S
) -> list[Mapping[str, object]]:
    """What came of a test message through each channel, all at once; `error` is None where it was taken."""
    message = sample(setup.place(config), clock.wall())

    async def picture() -> bytes | None:
        return await draw(Wanted(journal=None, title=f"The reward of {message.run} (an example)"))

    async def attempt(channel: Channel) -> Mapping[str, object]:
        try:
            async with asyncio.timeout(timeout_s):
                await hand_over(channel, message, None, picture)
        except ANSWERS as error:
            return {"channel": channel.name, "ok": False, "error": str(error)}
        except Unforeseen as fault:
            return {"channel": channel.name, "ok": False, "error": f"a fault of Stepguard: {fault}"}
        except TimeoutError:
            return {"channel": channel.name, "ok": False, "error": f"no answer within {timeout_s:g} s"}
        return {"channel": channel.name, "ok": True, "error": None}

    return list(await asyncio.gather(*(attempt(channel) for channel in channels)))
