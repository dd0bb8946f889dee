"""Whatever happens: no exception, no broken promise; and once the faults stop, the run goes on."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from strange_events import events, gaps

from stepguardd.core.commands import Notify, PublishGate
from stepguardd.core.decide import decide
from stepguardd.core.events import DaemonStarted, EffectEnded, Event, OperatorAsked
from stepguardd.core.state import Mode, Server, Settings, State, initial
from stepguardd.journal import _EVENTS, _STATE, encode, encode_command
from stepguardd.testing import FakeServer, FakeTrainer, Promises, World

modes = st.sampled_from(list(Mode))
figures = st.builds(
    Settings,
    push_weights=st.booleans(),
    weights_fixed=st.sampled_from([False, False, False, True]),
    trainer_managed=st.booleans(),
    on_policy_collapse=st.sampled_from(["call", "rollback"]),
    restart_budget=st.integers(min_value=0, max_value=4),
    quorum=st.sampled_from([0.0, 0.5, 0.75, 1.0]),
    poison_steps=st.integers(min_value=1, max_value=3),
    probation_steps=st.integers(min_value=1, max_value=3),
    max_staleness=st.integers(min_value=0, max_value=1),
    locked_out_hold_s=st.sampled_from([60.0, 1800.0]),
)


def answering(state: State, told: Event) -> Event:
    """An outcome answers what is waited for, else it would hardly ever mean anything."""
    if not isinstance(told, EffectEnded):
        return told
    repairs = (*(server.repair for server in state.servers), state.rollback, state.relaunch)
    wanted = [halt.intent for halt in state.halts if halt.intent is not None]
    wanted += [one.intent for one in repairs if one is not None and one.intent is not None]
    return replace(told, intent=wanted[-1]) if wanted else told


def played(mode: Mode, figures: Settings, story: list[tuple[float, Event]]) -> tuple[State, list[Any], float]:
    """A story told to the core, under the promises; an effect's outcome may answer the newest intent."""
    now = 100.0
    servers = tuple(Server(name=name, managed=name == "a", since=now) for name in ("a", "b"))
    state, promises, said = initial(replace(figures, mode=mode), mode, servers), Promises(), []
    for gap, told in story:
        now += gap
        before, heard = state, answering(state, told)
        state, commands = decide(before, heard, now)
        promises.after(before, heard, state, commands, now)
        said += commands
    return state, said, now


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(modes, figures, st.lists(st.tuples(gaps, events), max_size=60))
def test_no_story_breaks_a_promise_or_raises(
    mode: Mode, figures: Settings, story: list[tuple[float, Event]]
) -> None:
    state, said, _ = played(mode, figures, story)
    event(f"phase {state.phase.value}")
    event(f"commands {min(len(said) // 20 * 20, 100)}")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(figures, st.lists(st.tuples(gaps, events), max_size=60))
def test_in_mode_shadow_and_with_nobody_asking_the_page_never_says_anything_but_go(
    figures: Settings, story: list[tuple[float, Event]]
) -> None:
    quiet = [(gap, told) for gap, told in story if not isinstance(told, OperatorAsked)]
    state, said, _ = played(Mode.SHADOW, figures, quiet)
    assert state.gate.order.value == "GO"
    assert all(write.gate.order.value == "GO" for write in said if isinstance(write, PublishGate))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(modes, figures, st.lists(st.tuples(gaps, events), max_size=40))
def test_the_same_story_gives_the_same_bytes(
    mode: Mode, figures: Settings, story: list[tuple[float, Event]]
) -> None:
    """And a state that went through the journal decides the same as one that did not."""
    first = played(mode, figures, story)
    again = played(mode, figures, story)
    assert [encode_command(c) for c in first[1]] == [encode_command(c) for c in again[1]]
    text = encode(first[0], {"State": _STATE})
    restored = _STATE.validate_json(text)
    assert encode(restored, {"State": _STATE}) == text
    for _, told in story[-3:]:
        one, said = decide(first[0], told, first[2] + 1)
        two, also = decide(restored, told, first[2] + 1)
        assert [encode_command(c) for c in said] == [encode_command(c) for c in also]
        assert encode(one, {"State": _STATE}) == encode(two, {"State": _STATE})


@settings(max_examples=150, deadline=None)
@given(events)
def test_every_event_comes_back_from_the_journal_as_it_was(told: Event) -> None:
    kind = type(told).__name__
    text = encode(told, _EVENTS)
    assert encode(_EVENTS[kind].validate_json(text), _EVENTS) == text


@settings(max_examples=10, deadline=None)
@given(modes, st.lists(st.tuples(gaps, events), min_size=20, max_size=40))
def test_a_state_does_not_grow(mode: Mode, story: list[tuple[float, Event]]) -> None:
    """The same story ten times over leaves hardly more behind than once."""
    once = len(encode(played(mode, Settings(), story)[0], {"State": _STATE}))
    often = len(encode(played(mode, Settings(), story * 10)[0], {"State": _STATE}))
    assert often <= once + 40_000


# ---- liveness --------------------------------------------------------------------------------------

faults = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "kill",
                "kill root",
                "stop",
                "freeze",
                "unlisten",
                "pause",
                "mute",
                "no start",
                "no stop",
                "no load",
                "stale",
                "zeros",
                "refused",
                "deaf",
                "no resync",
                "daemon",
                "ask pause",
                "ask resume",
                "heal",
                "ask rollback",
                "ask restart",
                "ask shadow",
                "ask hold",
                "ask act",
                "step",
                "step",
            ]
        ),
        st.sampled_from(["a", "b"]),
        st.sampled_from([0.0, 0.25, 1.0, 4.0, 15.0, 70.0]),
    ),
    max_size=8,
)


def do(world: World, what: str, name: str) -> None:
    """One fault or wish."""
    fake, trainer = world.servers[name], world.trainer
    match what.split():
        case ["kill"] if len(fake.procs) > 1:
            world.kill(name)
        case ["kill", "root"] if fake.procs:
            world.kill(name, role=fake.procs[0].role)
        case ["stop"]:
            fake.stopped, fake.cont_helps = True, False
        case ["freeze"]:
            fake.frozen, fake.busy = True, False
        case ["unlisten"]:
            fake.listens = False
        case ["pause"]:
            fake.paused = True
        case ["mute"]:
            fake.can_generate = False
        case ["no", "start"]:
            fake.can_start = False
        case ["no", "stop"]:
            fake.can_stop = False
        case ["no", "load"]:
            fake.can_load = False
        case ["no", "resync"]:
            trainer.can_resync = False
        case ["stale"]:
            fake.version = "base"
        case ["zeros"]:
            world.batch(0.0)
        case ["refused"]:
            world.batch(failed=30, refused="failed_fraction")
        case ["deaf"]:
            trainer.listens = False
        case ["daemon"]:
            world.restart_daemon()
        case ["ask", "pause" | "resume" | "rollback" as verb]:
            world.ask(verb)
        case ["ask", "restart"]:
            world.ask("restart-server", server=name)
        case ["ask", mode] if mode in {"shadow", "hold", "act"}:
            world.ask("mode", mode=mode)
        case ["heal"]:
            heal(world)
        case ["step"]:
            world.step()
        case _:
            pass


def heal(world: World) -> None:
    """The faults stop: what lives works again, what starts or loads succeeds."""
    for fake in world.servers.values():
        fake.stopped = fake.frozen = fake.paused = False
        fake.cont_helps = fake.busy = fake.listens = fake.can_generate = True
        fake.can_start = fake.can_stop = fake.can_load = True
        if len(fake.procs) == 1:
            world.kill(fake.name, role=fake.procs[0].role)  # what is left of a tree ends by itself
    world.trainer.listens = world.trainer.can_resync = True


@pytest.mark.timeout(120)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.booleans(), st.sampled_from(["act", "hold", "shadow"]), faults)
def test_once_the_faults_stop_the_run_goes_on_or_a_person_was_called(
    push: bool, mode: str, story: list[tuple[str, str, float]]
) -> None:
    """
    Within ten simulated minutes: GO, or one of the holds that only a person ends.

    A person who then resumes, and restarts what is dead, gets the run going: no state is a trap.
    """
    world = World("a", "b", mode=mode, settings=Settings(push_weights=push), target=(1, "/c/1"))
    for what, name, gap in story:
        do(world, what, name)
        world.run(gap)
    assume(not world.trainer.stopped)
    heal(world)
    world.run(600, until=lambda: world.order == "GO")
    state = world.state
    person = state.lockout or state.pause or (state.trip is not None and state.trip.kind == "called")
    dead = mode != "act" or state.mode is not Mode.ACT
    event(f"{world.order} in mode {state.mode.value}, phase {state.phase.value}")
    assert world.order == "GO" or person or dead, (world.gate, state.servers)
    if world.order == "GO" or world.trainer.stopped:
        return
    world.ask("mode", mode="act")
    world.ask("resume")
    world.run(900, until=lambda: world.order == "GO")
    assert world.order == "GO", (world.gate, state.trip, state.servers)


@settings(max_examples=30, deadline=None)
@given(st.integers(min_value=0, max_value=2**30), st.integers(min_value=0, max_value=40))
def test_a_daemon_that_starts_never_lowers_a_generation(found: int, ours: int) -> None:
    world = World(FakeServer(name="a"), trainer=FakeTrainer(pid=3))
    world.state = replace(world.state, gate=replace(world.gate, generation=ours))
    world.feed(DaemonStarted(gate_order="HOLD", gate_generation=found))
    assert world.gate.generation >= max(found, ours)
    assert not [c for c in world.all(Notify) if c.what == "opened"]
