"""The channels that a configuration asks for, and what the book has to know of each."""

from collections.abc import Callable

from ..config import Config
from ..core.alerts.book import Level, Policy, Route
from ..core.alerts.words import Place
from ..credentials import Secret, read_secret
from .channels.apprise_urls import Apprise
from .channels.contract import Channel
from .channels.slack import SlackBot, SlackWebhook
from .channels.webhook import Webhook
from .peers import Peers


def channels(config: Config, peers: Peers) -> list[tuple[Channel, Route]]:
    """
    Every channel that is set, in the order of the file.

    Secrets are read when something is sent: one that is missing or new is no reason to restart the watchdog.
    """
    found: list[tuple[Channel, Route]] = []
    slack, email, webhook, apprise = config.slack, config.email, config.webhook, config.apprise
    if slack.token_secret is not None:
        assert slack.channel is not None
        token = _reader("slack.token_secret", slack.token_secret)
        found.append((SlackBot(peers, token, slack.channel, slack.api_url), _route("slack", slack.min_level)))
    elif slack.webhook_secret is not None:
        url = _reader("slack.webhook_secret", slack.webhook_secret)
        found.append((SlackWebhook(peers, url), _route("slack", slack.min_level)))
    if email.host is not None:
        from .channels.email import Email  # noqa: PLC0415 - 14 MB with its parsers, where mail is sent

        password = None
        if email.password_secret is not None:
            password = _reader("email.password_secret", email.password_secret)
        found.append((Email(peers, email, password), _route("email", email.min_level, email.wait_s)))
    if webhook.url_secret is not None:
        key = None
        if webhook.signing_secret is not None:
            key = _reader("webhook.signing_secret", webhook.signing_secret)
        hook = Webhook(peers, _reader("webhook.url_secret", webhook.url_secret), key)
        found.append((hook, _route("webhook", webhook.min_level)))
    if apprise.urls_secret is not None:
        urls = _reader("apprise.urls_secret", apprise.urls_secret)
        found.append((Apprise(urls), _route("apprise", apprise.min_level)))
    return found


def peers(config: Config) -> Peers:
    """The way out that the config allows."""
    alerts = config.alerts
    return Peers(internal_hosts=alerts.internal_hosts, proxy=alerts.proxy, ca_file=alerts.ca_file)


def policy(config: Config) -> Policy:
    """When messages are sent."""
    alerts = config.alerts
    quiet = None
    if alerts.quiet_hours is not None:
        begin, _, end = alerts.quiet_hours.partition("-")
        quiet = (_minute(begin), _minute(end))
    return Policy(
        repeat_s=alerts.repeat_s,
        update_after_s=alerts.update_after_s,
        max_per_hour=alerts.max_per_hour,
        quiet=quiet,
    )


def place(config: Config) -> Place:
    """Where the run is, for a person who reads of it on another machine."""
    run = config.run
    return Place(run=run.name, option=f"--run-dir {run.run_dir}", link=config.alerts.page_url)


def _route(name: str, level: str, wait_s: float = 1.0) -> Route:
    return Route(name=name, wait_s=wait_s, level=Level[level.upper()])


def _reader(key: str, source: str) -> Callable[[], Secret]:
    return lambda: read_secret(key, source)


def _minute(text: str) -> int:
    hours, _, minutes = text.partition(":")
    return 60 * int(hours) + int(minutes)
