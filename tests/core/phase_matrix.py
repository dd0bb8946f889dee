"""
The phase matrix: what a server may go through, and what Stepguard makes of it, on the virtual clock.

Run as a program it writes the table into docs/signals.md anew; the test looks that it is there as played.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from stepguardd.core.commands import Notify, StopServer
from stepguardd.core.events import Proc as Process
from stepguardd.core.events import ProcessExited, RequestsFailed, TreeSeen
from stepguardd.core.state import ServerState, Settings
from stepguardd.testing import FakeServer, World

PAGE: Final = Path(__file__).parents[2] / "docs" / "signals.md"
BEGIN: Final = "<!-- phase matrix: made by tests/core/phase_matrix.py -->\n"
END: Final = "<!-- end of the phase matrix -->\n"
LATER_S: Final = 420.0

Kill = Literal["never", "at once", "after 60 s"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """
    One row.

    Args:
        name: what the server goes through.
        play: brings it about in a world at work, from the moment that counts as its beginning.
        setting: the world.
        planned: whether it counts as silent on purpose meanwhile.
        verdict: the reason of the hold; None where the run must not be held.
        within_s: the hold comes at most so much later.
        kill: when the server may be ended, counted from the hold.
        goes_on: whether the run goes on by itself within seven minutes.

    """

    name: str
    play: Callable[[World], None]
    setting: Callable[[], World]
    planned: bool = False
    verdict: str | None = None
    within_s: float = 0.0
    kill: Kill = "never"
    goes_on: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it. Times in seconds from its beginning; the kill's from the hold."""

    verdict: str | None
    held_s: float | None
    killed_s: float | None
    goes_on: bool
    planned: bool
    current: bool
    told: tuple[str, ...]


def at_work(*, settings: Settings | None = None, **fake: object) -> Callable[[], World]:
    """A server with eight requests of a trainer in its rollouts, half a minute in."""

    def make() -> World:
        server = FakeServer(name="s", **{"load": 8, **fake})  # type: ignore[arg-type]
        world = World(server, settings=settings or Settings(push_weights=True))
        world.run(30.0)
        return world

    return make


@functools.cache
def played(phase: Phase) -> Outcome:
    """Play one row to its end; the same outcome however often it is asked for."""
    world = phase.setting()
    began = world.now
    phase.play(world)
    world.run(LATER_S)
    notices = [(at, said) for at, said in world.said if isinstance(said, Notify)]
    opened = [(at, said.reason) for at, said in notices if said.what == "opened"]
    stops = [at for at, said in world.said if isinstance(said, StopServer)]
    held_at, verdict = opened[0] if opened else (None, None)
    return Outcome(
        verdict=verdict,
        held_s=None if held_at is None else held_at - began,
        killed_s=stops[0] - (began if held_at is None else held_at) if stops else None,
        goes_on=world.order == "GO",
        planned=any(at >= began and state is ServerState.PLANNED for at, _, state in world.moves),
        current=world.fake.version == world.trainer.version,
        told=tuple(f"{at - began:+.2f} {said.what}: {said.text}" for at, said in notices),
    )


# ---- what is done ----------------------------------------------------------------------------------


def for_a_while(seconds: float, **fields: object) -> Callable[[World], None]:
    """The fake's fields are set so for so long, and then as they were."""

    def play(world: World) -> None:
        fake = world.fake
        before = {name: getattr(fake, name) for name in fields}
        for name, value in fields.items():
            setattr(fake, name, value)
        world.run(seconds)
        for name, value in before.items():
            setattr(fake, name, value)

    return play


def for_good(**fields: object) -> Callable[[World], None]:
    """The fake's fields are set so until somebody restarts it."""

    def play(world: World) -> None:
        for name, value in fields.items():
            setattr(world.fake, name, value)

    return play


def killed(role: str) -> Callable[[World], None]:
    def play(world: World) -> None:
        world.kill(role=role)

    return play


def detokenizer_killed(world: World) -> None:
    parent = world.fake.procs[0]
    detokenizer = Process(pid=parent.pid + 2, start_ticks=parent.start_ticks, role="detokenizer")
    world.feed(TreeSeen(server="s", procs=(*world.fake.procs, detokenizer)))
    world.feed(ProcessExited(server="s", proc=detokenizer))


def restarted_by_somebody(world: World) -> None:
    """It dies, and comes back with the base model's weights, of which it says nothing."""
    world.kill(role="server")
    world.kill(role="scheduler")
    world.run(20.0)
    world.fake.spawn(world.now)


def taken_over(world: World) -> None:
    world.fake.other = "twin"
    world.kill(role="server")


def drained(world: World) -> None:
    """SIGTERM with requests running: `/ready` says no, they get their tokens, and then it ends."""
    world.fake.unhealthy = True
    world.run(720.0)
    assert world.orders() == ["GO"], world.told("opened")
    world.kill(role="server")


def unhealthy_for_others(world: World) -> None:
    """Somebody else's health check fails on a frozen scheduler: from then on `/ready` says no as well."""
    world.fake.frozen, world.fake.busy = True, False
    world.run(2.0)
    world.fake.unhealthy = True


def requests_refused(world: World) -> None:
    """`/generate` says 503 at once, and `/ready` as well; the other endpoints are well."""
    world.fake.unhealthy = world.fake.refuses = True
    for count in range(1, 33):
        world.feed(RequestsFailed(attempt=0, in_a_row=count, error="HTTPStatusError: 503"))
        world.run(0.25)


def released(world: World) -> None:
    """The trainer of a colocated run takes the GPUs for longer than any lease."""
    world.trainer.phase = "TRAIN"
    world.see_trainer()
    before = len(world.asked)
    for_a_while(1200.0, frozen=True, busy=False)(world)
    assert world.asked[before:] == []
    world.trainer.phase = "ROLLOUT"


def synced(world: World) -> None:
    world.trainer.phase = "SYNC"
    world.see_trainer()
    for_a_while(40.0, frozen=True, busy=False)(world)
    world.trainer.phase = "ROLLOUT"


def announced(world: World) -> None:
    world.ask("plan-server", server="s", for_s=300.0)
    for_a_while(240.0, mute=True, busy=False)(world)


def nothing(world: World) -> None:
    world.run(600.0)


def cold_start() -> World:
    return World(FakeServer(name="s", load_s=120.0, load=8), running=False)


OLD: Final = frozenset({"ready", "loads"})
VLLM: Final = frozenset({"ready", "server_info", "loads"})
BARE: Final = frozenset({"ready", "server_info", "loads", "metrics"})

# ---- the rows --------------------------------------------------------------------------------------

MATRIX: Final = (
    # Nothing is wrong.
    Phase(name="cold start of 120 s", setting=cold_start, play=nothing),
    Phase(name="idle for 10 minutes", setting=at_work(load=0), play=nothing),
    Phase(name="prefill of 60 s, in chunks", setting=at_work(), play=for_a_while(60.0, chunk_s=5.0)),
    *(
        Phase(
            name=f"paused for 90 s, mode `{mode}`",
            planned=True,
            setting=at_work(),
            play=for_a_while(90.0, paused=True, busy=False, pause_mode=mode),
        )
        for mode in ("abort", "in_place", "retract")
    ),
    Phase(
        name="paused for 90 s, without a `/ready` to say so",
        planned=True,
        setting=at_work(lacks=OLD),
        play=for_a_while(90.0, paused=True, busy=False),
    ),
    Phase(
        name="colocated: memory released for 20 minutes, phase TRAIN",
        planned=True,
        setting=at_work(settings=Settings(push_weights=True, colocated=True)),
        play=released,
    ),
    Phase(name="weight update of 40 s, phase SYNC", planned=True, setting=at_work(), play=synced),
    Phase(
        name="weight update of 40 s, unannounced, a processor busy",
        setting=at_work(),
        play=for_a_while(40.0, frozen=True),
    ),
    Phase(
        name="silent for 4 minutes, announced by `plan-server`",
        planned=True,
        setting=at_work(),
        play=announced,
    ),
    # It looks like a fault from here: held, never killed.
    Phase(
        name="prefill of 60 s in one pass",
        setting=at_work(),
        play=for_a_while(60.0, frozen=True),
        verdict="server_spinning",
        within_s=45.0,
    ),
    Phase(
        name="weight update of 40 s, unannounced, no processor busy",
        setting=at_work(),
        play=for_a_while(40.0, frozen=True, busy=False),
        verdict="server_hung",
        within_s=10.0,
    ),
    Phase(
        name="stopped (SIGSTOP), and woken by SIGCONT",
        setting=at_work(),
        play=for_good(stopped=True),
        verdict="server_stopped",
        within_s=2.0,
    ),
    # Deaths.
    Phase(
        name="scheduler killed",
        setting=at_work(),
        play=killed("scheduler"),
        verdict="server_died",
        kill="at once",
    ),
    Phase(
        name="detokenizer killed",
        setting=at_work(),
        play=detokenizer_killed,
        verdict="server_died",
        kill="at once",
    ),
    Phase(
        name="parent killed",
        setting=at_work(),
        play=killed("server"),
        verdict="server_died",
        kill="at once",
    ),
    Phase(
        name="killed, and 120 s to start again",
        setting=at_work(load_s=120.0),
        play=killed("scheduler"),
        verdict="server_died",
        kill="at once",
    ),
    Phase(
        name="draining for 12 minutes, then gone",
        planned=True,
        setting=at_work(),
        play=drained,
        verdict="server_died",
        within_s=720.0,
        kill="at once",
    ),
    # It lives, and is of no use.
    Phase(
        name="stopped, and SIGCONT does not help",
        setting=at_work(cont_helps=False),
        play=for_good(stopped=True),
        verdict="server_stopped",
        within_s=2.0,
        kill="after 60 s",
    ),
    Phase(
        name="hang after N requests: deadlock",
        setting=at_work(),
        play=for_good(frozen=True, busy=False),
        verdict="server_hung",
        within_s=10.0,
        kill="after 60 s",
    ),
    Phase(
        name="hang after N requests: spinning",
        setting=at_work(),
        play=for_good(frozen=True),
        verdict="server_spinning",
        within_s=45.0,
        kill="after 60 s",
    ),
    Phase(
        name="frozen while paused",
        planned=True,
        setting=at_work(),
        play=for_good(paused=True, frozen=True, busy=False),
        verdict="server_hung",
        within_s=15.0,
        kill="after 60 s",
    ),
    Phase(
        name="deadlock, and `/ready` no by somebody else's health check",
        planned=True,
        setting=at_work(),
        play=unhealthy_for_others,
        verdict="server_hung",
        within_s=15.0,
        kill="after 60 s",
    ),
    Phase(
        name="frozen while nobody asks",
        setting=at_work(load=0, waited_for=False),
        play=for_good(frozen=True, busy=False),
        verdict="server_hung",
        within_s=110.0,
        kill="after 60 s",
    ),
    Phase(
        name="200 while dead: processes out of sight",
        setting=at_work(visible=False, managed=False),
        play=for_good(frozen=True),
        verdict="server_spinning",
        within_s=45.0,
        goes_on=False,
    ),
    Phase(
        name="port refused, processes alive",
        setting=at_work(),
        play=for_good(listens=False),
        verdict="server_unreachable",
        within_s=5.0,
        kill="after 60 s",
    ),
    Phase(
        name="503 storm",
        setting=at_work(),
        play=for_good(storm=True),
        verdict="server_unreachable",
        within_s=5.0,
        kill="after 60 s",
    ),
    Phase(
        name="503 to the trainer's requests and `/ready` alone",
        planned=True,
        setting=at_work(),
        play=requests_refused,
        verdict="requests_failed",
        within_s=3.0,
        kill="after 60 s",
    ),
    Phase(
        name="slow drip, or a black hole",
        setting=at_work(),
        play=for_good(mute=True, busy=False),
        verdict="server_unreachable",
        within_s=15.0,
        kill="after 60 s",
    ),
    # It serves, and must not be trusted.
    Phase(
        name="stale weights after a restart by somebody else",
        setting=at_work(managed=False),
        play=restarted_by_somebody,
        verdict="server_died",
    ),
    Phase(
        name="stale weights without a restart",
        setting=at_work(),
        play=for_good(version="base"),
        verdict="stale_weights",
        within_s=5.0,
    ),
    Phase(
        name="wrong process on the port: another program",
        setting=at_work(),
        play=for_good(other="garbled"),
        verdict="server_unreachable",
        within_s=5.0,
        kill="after 60 s",
        goes_on=False,
    ),
    Phase(
        name="killed, and another server on its port",
        setting=at_work(),
        play=taken_over,
        verdict="server_died",
        kill="at once",
        goes_on=False,
    ),
    # Servers that offer less.
    Phase(
        name="older SGLang (no `/ready`, no `/v1/loads`): deadlock",
        setting=at_work(lacks=OLD),
        play=for_good(frozen=True, busy=False),
        verdict="server_hung",
        within_s=10.0,
        kill="after 60 s",
    ),
    Phase(
        name="vLLM (`/metrics` and `/health`): deadlock",
        setting=at_work(lacks=VLLM),
        play=for_good(frozen=True, busy=False),
        verdict="server_hung",
        within_s=10.0,
        kill="after 60 s",
    ),
    Phase(
        name="no `/metrics`: deadlock",
        setting=at_work(lacks=frozenset({"metrics"})),
        play=for_good(frozen=True, busy=False),
        verdict="server_hung",
        within_s=25.0,
        kill="after 60 s",
    ),
    Phase(
        name="nothing but `/health`: deadlock",
        setting=at_work(lacks=BARE),
        play=for_good(frozen=True, busy=False),
        verdict="server_hung",
        within_s=110.0,
        kill="after 60 s",
    ),
)


# ---- the table in the docs -------------------------------------------------------------------------


def table() -> str:
    """The matrix as played, in Markdown."""
    lines = [
        "| what the server goes through | verdict | HOLD after | ended | goes on |",
        "|---|---|---|---|---|",
    ]
    for phase in MATRIX:
        found = played(phase)
        quiet = "no hold; `planned`" if found.planned else "no hold"
        verdict = quiet if found.verdict is None else f"`{found.verdict}`"
        held = "–" if found.held_s is None else f"{found.held_s:.4g} s"
        ended = "never" if found.killed_s is None else f"{found.killed_s:.4g} s later"
        ended = "at once" if found.killed_s == 0.0 else ended
        lines.append(f"| {phase.name} | {verdict} | {held} | {ended} | {'yes' if found.goes_on else 'no'} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """The page with the matrix as played between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    if BEGIN not in PAGE.read_text():
        sys.exit(f"{PAGE}: no mark {BEGIN!r}")
    PAGE.write_text(with_table(PAGE.read_text()))
