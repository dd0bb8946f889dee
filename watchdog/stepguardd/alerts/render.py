"""A message in each channel's form: plain text, Slack's mrkdwn, HTML, JSON. Each escapes in its own way."""

import html
import textwrap
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from ..core.alerts.book import Kind, Level
from ..core.alerts.words import Message

_COLOURS = {"call": "#c62a2f", "alert": "#ad5700", "well": "#18794e", "info": "#3451b2"}
_MARKS = {
    "call": ":red_circle:",
    "alert": ":large_orange_circle:",
    "well": ":large_green_circle:",
    "info": ":large_blue_circle:",
}
_WORDS = {"call": "A person is needed", "alert": "Held", "well": "Well again", "info": "To know"}


def tone(message: Message) -> str:
    """Which of four tones: call, alert, well or info."""
    if message.level is Level.CALL:
        return "call"
    if message.kind is Kind.RESOLVED:
        return "well"
    return "alert" if message.level is Level.ALERT else "info"


def local_time(wall: float) -> datetime:
    """Seconds since 1970 in the machine's zone."""
    return datetime.fromtimestamp(wall, UTC).astimezone()


def when(wall: float) -> str:
    """A time for people, with its zone."""
    return local_time(wall).strftime("%Y-%m-%d %H:%M:%S %Z")


def foot(message: Message) -> str:
    """Which run, which incident, since when."""
    parts = [f"run {message.run}"]
    if message.incident is not None:
        parts.append(f"incident {message.incident}")
    if message.onset_step is not None:
        parts.append(f"since step {message.onset_step}")
    if message.reason:
        parts.append(message.reason)
    parts.append(when(message.opened_wall if message.incident is not None else message.wall))
    return " · ".join(parts)


# --- plain text


def as_text(message: Message) -> str:
    """For mail readers without HTML, and for services that know nothing else."""
    parts = [message.headline]
    if message.lead:
        parts.append(message.lead)
    parts += [
        "\n".join([f"{section.title}:", *(f"  - {line}" for line in section.lines)])
        for section in message.sections
    ]
    if message.command is not None:
        command, effect = message.command
        parts.append(f"{_for_command(message)}:\n  {command}\n  ({effect})")
    if message.link is not None:
        parts.append(f"Look: {message.link}")
    parts.append(foot(message))
    return "\n\n".join(parts) + "\n"


def as_mail_text(message: Message) -> str:
    """The same at 80 columns; a command stays whole, so that it can be copied, and so does a link."""
    whole = {f"  {message.command[0]}"} if message.command is not None else set[str]()
    return "".join(
        line + "\n" if line in whole or not line else _at_80_columns(line) + "\n"
        for line in as_text(message).splitlines()
    )


def _at_80_columns(line: str) -> str:
    indent = " " * (4 if line.startswith("  - ") else 2 if line.startswith("  ") else 0)
    return textwrap.fill(line, 80, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _for_command(message: Message) -> str:
    return "To read more" if message.kind in {Kind.RESOLVED, Kind.TEST, Kind.DIGEST} else "To act or to undo"


# --- Slack


def mrkdwn(text: str) -> str:
    """Text that stays text: `<!channel>` and links need angle brackets, formats need their marks."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # A word joiner before each mark takes its meaning and leaves its looks.
    return "".join(f"\u2060{char}" if char in "*_~`" else char for char in escaped)


def as_mrkdwn(message: Message) -> str:
    """The whole message as one text."""
    parts = [f"{_MARKS[tone(message)]} *{mrkdwn(message.headline)}*"]
    if message.lead:
        parts[0] += f"\n{mrkdwn(message.lead)}"
    parts += [_slack_section(section.title, section.lines) for section in message.sections]
    if message.command is not None:
        parts.append(_slack_command(message))
    parts.append(_slack_foot(message))
    return "\n\n".join(parts)


def as_blocks(message: Message) -> list[dict[str, object]]:
    """The same in Slack's blocks."""
    lead = f"\n{mrkdwn(message.lead)}" if message.lead else ""
    blocks = [_block(f"{_MARKS[tone(message)]} *{mrkdwn(message.headline)}*{lead}")]
    blocks += [_block(_slack_section(section.title, section.lines)) for section in message.sections]
    if message.command is not None:
        blocks.append(_block(_slack_command(message)))
    blocks.append({"type": "context", "elements": [_slack_text(_slack_foot(message))]})
    return blocks


def _block(text: str) -> dict[str, object]:
    return {"type": "section", "text": _slack_text(text)}


def _slack_text(text: str) -> dict[str, object]:
    return {"type": "mrkdwn", "text": text[:2900], "verbatim": True}


def _slack_section(title: str, lines: tuple[str, ...]) -> str:
    return "\n".join([f"*{mrkdwn(title)}*", *(f"•  {mrkdwn(line)}" for line in lines)])


def _slack_command(message: Message) -> str:
    assert message.command is not None
    command, effect = message.command
    plain = command.replace("`", "'").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"*{_for_command(message)}*\n`{plain}`\n{mrkdwn(effect)}"


def _slack_foot(message: Message) -> str:
    link = "" if message.link is None else f" · <{_slack_link(message.link)}|open the page>"
    return mrkdwn(foot(message)) + link


def _slack_link(url: str) -> str:
    return url.replace("&", "&amp;").replace("|", "%7C").replace("<", "%3C").replace(">", "%3E")


# --- mail


def subject(message: Message) -> str:
    """One line; replies of a thread keep the incident's number in it, so that mail readers gather them."""
    number = "" if message.incident is None else f" #{message.incident}"
    return f"[{message.run}{number}] {message.headline}"


# For readers that keep a style sheet: dark where the person wants it. Others show the inline styles alone.
_DARK: Final = (
    ":root{color-scheme:light dark;supported-color-schemes:light dark}@media (prefers-color-scheme:dark){"
    ".back{background:#101215!important}.card{background:#1c1f24!important;color:#edeef0!important}"
    ".ink{color:#edeef0!important}.soft{color:#a6acb5!important}.code{background:#101215!important}"
    "a{color:#9eb1ff!important}.call{color:#ff8b8b!important}.alert{color:#f5b55f!important}"
    ".well{color:#6fdba3!important}.info{color:#9eb1ff!important}}"
)
_TITLE: Final = (
    'class="soft" style="margin:0;font-size:13px;font-weight:600;color:#60646c;padding-bottom:4px"'
)


def as_html(message: Message, picture: str | None) -> str:
    """
    A mail that reads well in any client: tables and inline styles, no script, nothing loaded from elsewhere.

    Light, and dark where the reader's mail program follows the person's choice.

    Args:
        message: what to say.
        picture: the Content-ID of the attached curve.

    """
    which = tone(message)
    colour = _COLOURS[which]
    rows = [
        f'<tr><td class="{which}" style="padding:6px 28px 0;font-size:13px;font-weight:600;color:{colour};'
        f'letter-spacing:.02em">{_WORDS[which]}</td></tr>',
        '<tr><td style="padding:4px 28px 0"><h1 class="ink" style="margin:0;font-size:21px;line-height:1.35;'
        f'font-weight:600;color:#1c2024">{html.escape(message.headline)}</h1></td></tr>',
    ]
    if message.lead:
        rows.append(_row(html.escape(message.lead), "padding:8px 28px 0;color:#43484e", "soft"))
    if picture is not None:
        image = (
            f'<img src="cid:{html.escape(picture)}" width="584" alt="The reward, step by step, with the hold '
            'marked" style="display:block;width:100%;max-width:584px;height:auto;border:0;border-radius:4px">'
        )
        rows.append(_row(image, "padding:18px 28px 0"))
    for section in message.sections:
        items = "".join(
            '<tr><td class="soft" style="vertical-align:top;padding:1px 10px 3px 0;color:#60646c">•</td>'
            f'<td style="padding:1px 0 3px;overflow-wrap:anywhere">{html.escape(line)}</td></tr>'
            for line in section.lines
        )
        listed = f'<table role="presentation" cellpadding="0" cellspacing="0" border="0">{items}</table>'
        rows.append(_row(f"<h2 {_TITLE}>{html.escape(section.title)}</h2>{listed}", "padding:18px 28px 0"))
    if message.command is not None:
        rows.append(_command_row(message))
    if message.link is not None:
        link = (
            f'<a href="{html.escape(message.link)}" style="color:#3451b2;font-weight:600">'
            "Open the run's page</a>"
        )
        rows.append(_row(link, "padding:16px 28px 0"))
    rows.append(
        _row(html.escape(foot(message)), "padding:22px 28px 22px;font-size:12px;color:#60646c", "soft")
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f'<meta name="supported-color-schemes" content="light dark"><style>{_DARK}</style>'
        f"<title>{html.escape(message.headline)}</title></head>"
        '<body class="back" style="margin:0;background:#f0f0f3">'
        '<table role="presentation" class="back" width="100%" cellpadding="0" cellspacing="0" border="0" '
        'style="background:#f0f0f3"><tr><td style="padding:24px 12px"><div role="main">'
        '<table role="presentation" class="card" align="center" cellpadding="0" cellspacing="0" border="0" '
        'style="width:100%;max-width:640px;background:#ffffff;border-radius:6px;'
        f"border-top:4px solid {colour};font:15px/1.5 -apple-system,'Segoe UI',Roboto,Helvetica,Arial,"
        'sans-serif;color:#1c2024"><tr><td style="height:16px;line-height:16px">&nbsp;</td></tr>'
        f"{''.join(rows)}</table></div></td></tr></table></body></html>\n"
    )


def _row(inner: str, style: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<tr><td{named} style="{style}">{inner}</td></tr>'


def _command_row(message: Message) -> str:
    assert message.command is not None
    command, effect = message.command
    return _row(
        f"<h2 {_TITLE}>{_for_command(message)}</h2>"
        '<div class="code" style="background:#f0f0f3;border-radius:4px;padding:9px 12px;font:13px/1.5 '
        f'ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere">{html.escape(command)}</div>'
        '<div class="soft" style="padding-top:4px;color:#60646c;font-size:13px">'
        f"{html.escape(effect)}</div>",
        "padding:18px 28px 0",
    )


# --- JSON


def as_json(message: Message) -> Mapping[str, object]:
    """The body of the generic webhook; its fields are documented in docs/alerts.md and only grow."""
    return {
        "version": 1,
        "id": message.number,
        "thread": message.thread,
        "kind": message.kind.value,
        "level": message.level.name.lower(),
        "run": message.run,
        "incident": message.incident,
        "reason": message.reason or None,
        "onset_step": message.onset_step,
        "opened_at": message.opened_wall,
        "written_at": message.wall,
        "headline": message.headline,
        "lead": message.lead,
        "sections": [{"title": one.title, "lines": list(one.lines)} for one in message.sections],
        "command": None if message.command is None else message.command[0],
        "link": message.link,
    }
