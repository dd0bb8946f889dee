"""
The status as a person sees it: 80 columns, at most 23 lines, the worst first, and what to do at the end.

Each source has its line. Where they are too many for the screen, those go first that have nothing bad to say.

It reads any daemon's answer: what is missing is shown as unknown, what is unheard of as it stands.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from stepguardd.control.contract import (
    GpuDict,
    HostDict,
    IncidentDict,
    LogDict,
    NodeDict,
    OomDict,
    PromptsDict,
    SavedDict,
    ServerDict,
    StatusDict,
    StreamDict,
)
from stepguardd.incidents.words import in_words
from stepguardd.oneline import one_line
from stepguardd.sparkline import sparkline

_NUMBERS = re.compile(r" \(uid \d+, pid \d+\)")
WIDTH = 80
LINES_MAX = 23
"""A terminal of 24 lines, and the prompt."""
SERVERS_MAX = 3
ACTIONS_MAX = 2
WARNINGS_MAX = 2

# What each phase of the breaker means to a person: a word, a colour, and what to do.
_PHASES = {
    "closed": ("GOING", "green", "Nothing."),
    "half_open": ("ON PROBATION", "yellow", "Nothing: it was repaired and goes on under watch."),
    "open": ("HELD", "red", ""),
    "shadow": ("WATCHED ONLY", "cyan", "Nothing is held in this mode; see the warnings."),
    "forced_open": ("PAUSED BY A PERSON", "magenta", "When you are done: stepguard resume"),
    "locked_out": (
        "LOCKED OUT",
        "red",
        "Decide: remove the cause and `stepguard resume`, or go back with `stepguard rollback`.",
    ),
}
_SERVER_COLOURS = {
    "serving": "green",
    "planned": "cyan",
    "starting": "yellow",
    "suspect": "yellow",
    "restarting": "yellow",
    "stale": "red",
    "dead": "red",
}
# The worst first, so that a long list is cut where it is well.
_WORST_FIRST = ("dead", "stale", "restarting", "suspect", "starting", "planned", "serving")


def is_well(status: StatusDict) -> bool:
    """Whether the run goes on with nothing in it known to be dead: exit code 0 or 1."""
    phase = status.get("breaker", {}).get("phase", "")
    dead = any(server.get("state") == "dead" for server in status.get("servers", []))
    return (
        phase in {"closed", "half_open", "shadow"}
        and status.get("trainer", {}).get("alive") is not False
        and not dead
    )


@dataclass(frozen=True, slots=True)
class _Fact:
    """
    One line of what is known. The screen is filled by `rank`, lowest first.

    0 is always shown, 1 says that something is wrong.
    """

    title: str
    text: Text
    rank: int = 2


def view(status: StatusDict) -> Group:
    """The whole picture, for rich to print."""
    below: list[Text | Table] = []
    lines = 1
    if status.get("servers"):
        shown = _servers(status["servers"])
        below += [Text(), *shown]
        lines += 2 + min(len(status["servers"]), SERVERS_MAX) + len(shown) - 1
    if incident := status.get("incident"):
        below += (story := [Text(), *_incident("Incident", incident)])
        lines += len(story)
    elif last := status.get("last_incident"):
        below += (story := [Text(), *_incident("Last incident", last)])
        lines += len(story)
    warnings = status.get("warnings", [])[:WARNINGS_MAX]
    below += [_line(f"warning: {warning}", "yellow") for warning in warnings]
    advice = Text.assemble(("What to do  ", "bold"), _cut(_advice(status), 2 * WIDTH - 14))
    below += [Text(), advice]
    lines += len(warnings) + 2 + (advice.cell_len > WIDTH)
    return Group(_headline(status), _facts(status, LINES_MAX - lines), *below)


def _headline(status: StatusDict) -> Text:
    phase = str(status.get("breaker", {}).get("phase", "unknown"))
    word, colour, _ = _PHASES.get(phase, (phase.upper(), "red", ""))
    line = Text.assemble(
        ("stepguard  ", "bold"), _cut(status.get("run"), 24), "  ", (_cut(word, 20), f"bold {colour}")
    )
    right = f"mode {_cut(status.get('mode'), 8)}, up {_span(status.get('uptime_s'))}"
    line.append(" " * max(1, WIDTH - line.cell_len - len(right)) + right, style="dim")
    return line


def _facts(status: StatusDict, lines_max: int) -> Table:
    facts = [_breaker(status), _trainer(status), _Fact("Reward", _reward(status), 0), *_more(status)]
    ranked = sorted(range(len(facts)), key=lambda at: facts[at].rank)
    shown = set(ranked[: max(lines_max, 3)])
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(width=WIDTH - 12, no_wrap=True, overflow="ellipsis")
    for at, fact in enumerate(facts):
        if at in shown:
            table.add_row(fact.title, fact.text)
    return table


def _breaker(status: StatusDict) -> _Fact:
    breaker, gate = status.get("breaker", {}), status.get("gate", {})
    reason = _cut(_said(breaker.get("reason")), WIDTH)
    phase = _cut(breaker.get("phase"), 12).replace("_", " ")
    words = f"{phase} for {_span(breaker.get('since_s'))}, gate {_cut(gate.get('order'), 9)}"
    return _Fact("Breaker", Text(words + (f": {reason}" if breaker.get("reason") else "")), 0)


def _trainer(status: StatusDict) -> _Fact:
    trainer = status.get("trainer", {})
    alive = {True: Text("alive", "green"), False: Text("gone", "bold red")}.get(
        trainer.get("alive"),  # type: ignore[arg-type]
        Text("not seen", "yellow"),
    )
    words = ""
    if trainer.get("step") is not None or trainer.get("alive"):
        words = f", step {_cut(trainer.get('step'), 12)}, {_cut(trainer.get('phase'), 10)}"
    if trainer.get("attempt"):
        words += f", attempt {_cut(trainer.get('attempt'), 6)}"
    if trainer.get("beat_age_s") is not None:
        words += f", beat {_span(trainer.get('beat_age_s'))} ago"
    return _Fact("Trainer", Text.assemble(alive, words), 0)


def _more(status: StatusDict) -> list[_Fact]:
    """What is known beside the trainer and the gate, in the order of the screen."""
    facts = []
    if nodes := status.get("nodes"):
        facts.append(_ranked("Machines", _nodes(nodes)))
    if stream := status.get("stream"):
        facts.append(_stream(stream))
    extra = []
    if status.get("refused_batches"):
        extra.append(f"{_cut(status.get('refused_batches'), 10)} bad batches refused")
    left = status.get("budget", {}).get("restarts_left")
    if left is not None:
        extra.append(f"{_cut(left, 6)} restarts left")
    if extra:
        facts.append(_Fact("Guarded", Text(", ".join(extra))))
    saved = status.get("checkpoints") or []
    if saved:
        facts.append(_Fact("Saved", Text(_checkpoints(saved))))
    if gpus := status.get("gpus"):
        facts.append(_ranked("GPUs", _gpus(gpus)))
    if host := status.get("host"):
        facts.append(_ranked("Host", _host(host)))
    if oom := status.get("oom"):
        facts.append(_ooms(oom))
    if logs := status.get("logs"):
        facts.append(_logs(logs))
    if prompts := status.get("prompts"):
        facts.append(_ranked("Prompts", _prompts(prompts)))
    unseen = status.get("unseen")
    if unseen and not status.get("incident"):  # in an incident the screen is for what is known
        facts.append(_Fact("Unseen", Text(_cut(", ".join(unseen), WIDTH), "dim"), 3))
    return facts


def _ranked(title: str, text: Text) -> _Fact:
    """What is coloured is what is wrong."""
    wrong = any("yellow" in str(part) or "red" in str(part) for part in (text.style, *text.spans))
    return _Fact(title, text, 1 if wrong else 2)


def _stream(stream: StreamDict) -> _Fact:
    """Where the reward is read beside the guard, and how new its newest step is."""
    path = str(stream.get("path"))
    name = path.rpartition("/")[2] or path  # the whole of it would push the rest off the screen
    if trouble := stream.get("trouble"):
        return _Fact("Stream", Text(_cut(str(trouble).replace(path, name), WIDTH), "yellow"), 1)
    if stream.get("step") is None:
        return _Fact("Stream", Text(f"no step yet in {_cut(name, WIDTH)}"))
    words = f"{_cut(stream.get('metric'), 34)}, step {_cut(stream.get('step'), 12)}"
    if stream.get("reward") is not None:
        words += f": {_figure(stream.get('reward'))}"
    if stream.get("age_s") is not None:
        words += f", {_span(stream.get('age_s'))} ago"
    return _Fact("Stream", Text(words))


def _nodes(nodes: Sequence[NodeDict]) -> Text:
    """How many other machines are there, and which are not."""
    away = [node for node in nodes if node.get("state") != "present"]
    line = Text(f"{len(nodes) - len(away)} of {len(nodes)} others are there")
    away.sort(key=lambda node: node.get("state") != "lost")
    for node in away[:1]:
        lost = node.get("state") == "lost"
        line.append("; ")
        words = f"{_cut(node.get('name'), 16)} {_cut(node.get('state'), 8)} for {_span(node.get('since_s'))}"
        line.append(words, "bold red" if lost else "yellow")
        if len(away) > 1:
            line.append(f", {len(away) - 1} more away", "yellow")
        elif lost:
            line.append(f": {_cut(node.get('why'), WIDTH)}")
    return line


def _prompts(prompts: PromptsDict) -> Text:
    """Who is suspected of killing the server, and who is not sent any more."""
    parts = []
    if suspected := prompts.get("suspected"):
        who = "suspect" if suspected == 1 else "suspects"
        named = _named(prompts.get("suspects"), suspected)
        parts.append(
            (f"{_cut(suspected, 6)} {who} after {_cut(prompts.get('crashes'), 6)} crashes{named}", "yellow")
        )
    if withheld := prompts.get("withheld"):
        named = "" if parts else _named(prompts.get("quarantine"), withheld)  # the suspects' fill the line
        parts.insert(0, (f"{_cut(withheld, 6)} withheld{named}", ""))
    return Text("; ").join(Text(*part) for part in parts)


def _named(keys: Sequence[str] | None, count: int) -> str:
    shown = list(keys or ())[:2]
    return (
        f": {', '.join(_cut(key, 20) for key in shown)}" + (" …" if count > len(shown) else "")
        if shown
        else ""
    )


def _figure(value: float | str | None) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else _cut(value, 10)


_OOM_NAMES = {"kernel": "kernel", "ray": "Ray", "cuda": "CUDA", "kv_pool": "KV pool"}


def _ooms(sources: Mapping[str, OomDict]) -> _Fact:
    """How often memory ran out, by who noticed; and the newest time."""
    counts = []
    newest = None
    for source, one in sources.items():
        count = one.get("count")
        counts.append(
            f"{_OOM_NAMES.get(source, _cut(source, 10))} {'?' if count is None else _cut(count, 8)}"
        )
        seen = one.get("newest")
        if seen and (newest is None or _age(seen) < _age(newest[1])):
            newest = source, seen
    some = any(one.get("count") for one in sources.values())
    line = Text(", ".join(counts), "yellow" if some else "")
    if newest is not None:
        whose = newest[1].get("server") or newest[1].get("name") or newest[1].get("role")
        source = _OOM_NAMES.get(newest[0], _cut(newest[0], 10))
        line.append(
            f"; {source} {_span(newest[1].get('age_s'))} ago: {_cut(whose, 24)}", "yellow" if some else "dim"
        )
    return _ranked("OOM", line)


def _age(seen: Mapping[str, Any]) -> float:
    age = seen.get("age_s")
    return age if isinstance(age, int | float) else float("inf")


def _logs(logs: Sequence[LogDict]) -> _Fact:
    """How many are followed, what cannot be read, and the newest line that meant something."""
    away = [one for one in logs if one.get("trouble")]
    read = len(logs) - len(away)
    line = Text(f"{read} of {len(logs)} followed", "" if read else "yellow")
    if dropped := sum(one["dropped_bytes"] for one in logs if isinstance(one.get("dropped_bytes"), int)):
        line.append(f", {dropped / 2**20:.0f} MiB came too fast", "yellow")
    told = [one for one in logs if one.get("sign")]
    if told:
        newest = min(told, key=_age)
        whose = _cut(newest.get("server") or "trainer", 16)
        sign = _cut(newest.get("sign"), 24).replace("_", " ")
        line.append(f"; {_span(newest.get('age_s'))} ago {whose}: {sign}")
    return _ranked("Logs", line)


def _gpus(gpus: Sequence[GpuDict]) -> Text:
    """All of them in one line: how full, the fullest, and what is wrong with any."""
    shares = {}
    for gpu in gpus:
        used, total = gpu.get("used_bytes"), gpu.get("total_bytes")
        if isinstance(used, int | float) and isinstance(total, int | float) and total > 0:
            shares[gpu.get("index")] = used / total
    line = Text(f"{len(gpus)}")
    if shares:
        fullest = max(shares, key=lambda index: shares[index])
        percents = [f"{share:.0%}" for share in list(shares.values())[:8]]
        more = " …" if len(shares) > 8 else ""
        line.append(f", memory {' '.join(percents)}{more}")
        if len(shares) > 8 or shares[fullest] > 0.97:
            style = "yellow" if shares[fullest] > 0.97 else ""
            line.append(f", fullest {_cut(fullest, 4)}: {shares[fullest]:.0%}", style)
    else:
        line.append(", memory unknown")
    if lost := [gpu for gpu in gpus if gpu.get("lost")]:
        line.append(f", {len(lost)} lost", "bold red")
    return line


def _host(host: HostDict) -> Text:
    available, total = host.get("available_bytes"), host.get("total_bytes")
    if isinstance(available, int | float) and isinstance(total, int | float) and total:
        style = "bold red" if available < 0.05 * total else "yellow" if available < 0.1 * total else ""
        words = f"{available / 2**30:.0f} of {total / 2**30:.0f} GiB of memory available"
        line = Text.assemble((words, style))
    else:
        line = Text.assemble(("memory unknown", "dim"))
    pressure = host.get("pressure")
    if pressure is None:
        line.append(", pressure unknown", "dim")
    else:
        waited = f", waited for {_percent(pressure.get('some_10s'))} of the last 10 s"
        line.append(waited, "yellow" if pressure.get("short") else "")
    return line


def _percent(value: float | None) -> str:
    return f"{value:.0f} %" if isinstance(value, int | float) and abs(value) < 1e6 else "?"


def _checkpoints(saved: Sequence[SavedDict]) -> str:
    """What could be gone back to, and what is not proven yet."""
    there = [row for row in saved if not row.get("set_aside")]
    proven = [_cut(row.get("step"), 12) for row in there if row.get("proven")]
    newest = there[-1] if there else {}
    words = f"proven: step {', '.join(proven[-3:])}" if proven else "none is proven yet"
    if newest and not newest.get("proven"):
        why = "inside an incident" if newest.get("inside_incident") else _cut(newest.get("verdict"), 12)
        steps = f"{_cut(newest.get('healthy_steps'), 6)} healthy steps"
        words += f"; newest: step {_cut(newest.get('step'), 12)} ({why}, {steps})"
    return words


def _reward(status: StatusDict) -> Text:
    values = [value if isinstance(value, int | float) else None for value in status.get("rewards") or []]
    known = [value for value in values if value is not None]
    last = status.get("trainer", {}).get("reward")
    if not known:
        return Text("unknown" if last is None else f"{last:.3g}")
    now = f"{last:.3g}" if isinstance(last, int | float) else "unknown"
    line = Text(f"{now}  ")
    line.append(sparkline(values[-40:]), style="cyan")
    line.append(f"  {min(known):.3g} to {max(known):.3g}", style="dim")
    return line


def _servers(servers: Sequence[ServerDict]) -> list[Table | Text]:
    ranked = sorted(servers, key=lambda server: _rank(server.get("state")))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for title, width in (
        ("Server", 16),
        ("State", 19),
        ("For", 9),
        ("Weights", 8),
        ("Restarts", 8),
        ("Pid", 7),
    ):
        table.add_column(title, width=width, no_wrap=True, overflow="ellipsis")
    for server in ranked[:SERVERS_MAX]:
        state = _cut(server.get("state"), 10)
        stage = f", {_cut(server.get('stage'), 10)}" if server.get("stage") else ""
        table.add_row(
            _cut(server.get("name"), 16),
            Text(state + stage, _SERVER_COLOURS.get(state, "red")),
            _span(server.get("since_s")),
            _cut(server.get("weight_version"), 8),
            _cut(server.get("restarts"), 8),
            _cut(server.get("pid"), 7),
        )
    rest = ranked[SERVERS_MAX:]
    if not rest:
        return [table]
    well = sum(server.get("state") == "serving" for server in rest)
    return [table, _line(f"and {len(rest)} more, {well} of them serving", "dim")]


def _rank(state: str | None) -> int:
    return _WORST_FIRST.index(state) if state in _WORST_FIRST else -1


def _incident(title: str, incident: IncidentDict) -> list[Text]:
    onset = incident.get("onset_step")
    since = "" if onset is None else f" since step {_cut(onset, 12)}"
    head = _line(
        f"{title} {_cut(incident.get('id'), 9)}: {_cut(_said(incident.get('cause')), 24)}{since}, "
        f"{_span(incident.get('opened_s'))} ago, {_cut(incident.get('stage'), 14)}",
        "bold",
    )
    actions = incident.get("actions") or []
    lines = [head]
    if known := incident.get("known_to"):
        lines.append(_line(f"in hand: {_said(known)}", "cyan"))
    return [*lines, *(_line(f"- {_said(action)}", "") for action in actions[-ACTIONS_MAX:])]


def _advice(status: StatusDict) -> str:
    """What to do, and where to read on when something happened."""
    advice = _do(status)
    incident = status.get("incident") or status.get("last_incident")
    if incident and incident.get("id") is not None:
        number = _cut(incident["id"], 9)
        advice = f"{advice.removesuffix('.')}{'.' if advice else ''} The report: stepguard report {number}"
    return advice.strip()


def _do(status: StatusDict) -> str:
    phase = status.get("breaker", {}).get("phase", "")
    if status.get("trainer", {}).get("alive") is False and phase in {"closed", "half_open", "shadow"}:
        return "The trainer is gone: start it again, with STEPGUARD_RUN_DIR set."
    if phase == "open":
        if status.get("mode") == "act":
            return "Nothing yet: Stepguard is repairing it."
        return 'Repair the cause, or let Stepguard: stepguard restart-server, or mode = "act".'
    return _PHASES.get(phase, ("", "", "This daemon is newer than this command: update it."))[2]


def _line(text: str, style: str) -> Text:
    return Text(_cut(text, WIDTH), style=style, no_wrap=True, overflow="ellipsis")


def _said(text: Any) -> str | None:
    """A note's words without what is for the journal: reason codes, a user's number and a process's."""
    return None if text is None else _NUMBERS.sub("", in_words(str(text)))


def _cut(value: Any, width: int) -> str:
    """Text from the daemon, which has it from anywhere: one line, no control characters, at most so wide."""
    return "-" if value is None else one_line(str(value), width)


def _span(seconds: float | None) -> str:
    """A duration in the one or two units that matter."""
    if not isinstance(seconds, int | float) or not seconds < 1e12:
        return "?"
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    whole = int(seconds)
    if whole >= 10 * 86_400:
        return f"{whole // 86_400} d"
    for size, unit, smaller, smaller_unit in (
        (86_400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {smaller_unit}"
    return f"{whole} s"
