"""The memory ladder: which way, how far, refused with the sum, and what becomes of it at a restart."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepguardd.core import memory, rungs
from stepguardd.core.commands import Command, StartServer, StopServer
from stepguardd.core.decide import decide
from stepguardd.core.events import (
    Answer,
    EffectEnded,
    Event,
    OomKind,
    OomSeen,
    OrderAcknowledged,
    Proc,
    ProcessExited,
    Role,
    ServerProbed,
    Tick,
    TrainerSeen,
    TreeSeen,
)
from stepguardd.core.memory import Climb, Ladder, Limits, Shortage, Sizes, refusal, step, up
from stepguardd.core.state import Hands, Mode, Server, ServerState, Settings, State, initial
from stepguardd.core.turn import Turn
from stepguardd.effects.model_sizes import sizes

LADDER = Ladder()
GIB = 2**30
SMALL = Sizes(weights_bytes=10 * GIB, kv_bytes_per_token=131_072, gpu_bytes=80 * GIB)
BIG = replace(SMALL, weights_bytes=60 * GIB)


@pytest.mark.parametrize(
    ("shortage", "now", "after"),
    [
        (Shortage.HOST, Limits(mem_fraction=0.8, running=32), Limits(mem_fraction=0.8, running=16)),
        (Shortage.HOST, Limits(mem_fraction=0.8, running=8), Limits(mem_fraction=0.7, running=8)),
        (Shortage.GPU_RUN, Limits(mem_fraction=0.8, running=32), Limits(mem_fraction=0.7, running=16)),
        (Shortage.GPU_RUN, Limits(), Limits(mem_fraction=0.8, running=32)),
        (
            Shortage.GPU_RUN,
            Limits(mem_fraction=0.4, running=8),
            Limits(mem_fraction=0.4, running=8, prefill_tokens=4096),
        ),
        (Shortage.GPU_RUN, Limits(mem_fraction=0.4, running=8, prefill_tokens=512), None),
        (Shortage.POOL, Limits(mem_fraction=0.6), Limits(mem_fraction=0.7)),
        (Shortage.POOL, Limits(mem_fraction=0.9), None),
        (Shortage.GPU_START, Limits(mem_fraction=0.8), Limits(mem_fraction=0.7)),
        (Shortage.SUSPECTED, Limits(running=64), Limits(running=32)),
    ],
)
def test_each_shortage_has_its_own_direction(shortage: Shortage, now: Limits, after: Limits | None) -> None:
    assert step(now, shortage, LADDER, SMALL).limits == after


def test_a_start_that_cannot_hold_the_weights_goes_up_whatever_the_message_says() -> None:
    assert step(Limits(mem_fraction=0.6), Shortage.GPU_START, LADDER, BIG).limits == Limits(mem_fraction=0.7)


def test_a_rung_that_cannot_hold_weights_and_cache_is_refused_with_the_sum() -> None:
    rung = step(Limits(mem_fraction=0.8), Shortage.GPU_START, LADDER, BIG)
    assert rung.limits is None
    assert rung.words == (
        "mem_fraction_static 0.7 refused: weights 60.0 GiB + KV cache 1.0 GiB (8192 tokens) = 61.0 GiB, "
        "and 0.7 of 80.0 GiB is 56.0 GiB"
    )
    assert refusal(0.1, LADDER, Sizes()) is None, "what is unknown is not refused"
    assert "not checked" in step(Limits(mem_fraction=0.8), Shortage.GPU_START, LADDER, Sizes()).words


@given(
    st.lists(st.sampled_from(Shortage), max_size=40),
    st.one_of(st.none(), st.floats(0.3, 0.95)),
    st.one_of(st.none(), st.integers(1, 512)),
)
def test_the_ladder_ends_and_no_rung_is_one_that_was_refused(
    shortages: list[Shortage], fraction: float | None, running: int | None
) -> None:
    limits = Limits(mem_fraction=fraction, running=running)
    down = 0
    for shortage in shortages:
        rung = step(limits, shortage, LADDER, SMALL)
        if rung.limits is None:
            continue
        assert rung.limits != limits
        if shortage is not Shortage.POOL and rung.limits.mem_fraction != limits.mem_fraction:
            assert rung.limits.mem_fraction is not None
            assert refusal(rung.limits.mem_fraction, LADDER, SMALL) is None
        down += shortage is not Shortage.POOL
        limits = rung.limits
    assert Shortage.POOL in shortages or down <= len(LADDER.mem_fractions) + len(LADDER.running) + 4


def test_it_goes_up_once_after_a_quiet_time_and_never_beyond_the_servers_own() -> None:
    own = Limits(mem_fraction=0.75, running=20)
    climb = Climb(own=own, limits=Limits(mem_fraction=0.7, running=8), short_at=100.0)
    assert up(climb, LADDER, 100.0 + LADDER.quiet_s - 1) is None
    higher = up(climb, LADDER, 100.0 + LADDER.quiet_s)
    assert higher is not None
    assert higher.limits == Limits(mem_fraction=0.75, running=16)
    assert up(higher, LADDER, 1e9) is None, "once"
    assert up(climb, replace(LADDER, quiet_s=0.0), 1e9) is None, "not allowed"


def test_the_sizes_are_read_from_the_models_own_files(tmp_path: Path) -> None:
    config = {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    config |= {"num_hidden_layers": 32, "torch_dtype": "bfloat16"}  # type: ignore[dict-item]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "a.safetensors").write_bytes(b"x" * 1000)
    command = ("python", "-m", "sglang.launch_server", "--model-path", str(tmp_path), "--tp-size", "2")
    found = sizes(command, cwd=None, gpu_gib=80)
    assert found == Sizes(weights_bytes=500, kv_bytes_per_token=65_536, gpu_bytes=80 * GIB)
    assert sizes(("python", "--model-path", "/nowhere"), cwd=None, gpu_gib=None) == Sizes()


# ---- at a restart ------------------------------------------------------------------------------------


class Run:
    """One server under `decide`, with every effect done at once."""

    def __init__(self, **server: object) -> None:
        made = Server(name="s", managed=True, **server)  # type: ignore[arg-type]
        self.state: State = initial(Settings(mode=Mode.ACT, backoff_first_s=0.01), Mode.ACT, (made,))
        self.now = 0.0
        self.pid = 10
        self.starts: list[StartServer] = []
        self.kept_arguments: str | None = None

    @property
    def server(self) -> Server:
        return self.state.servers[0]

    def feed(self, event: Event) -> tuple[Command, ...]:
        self.now += 0.5
        self.state, commands = decide(self.state, event, self.now)
        for command in commands:
            intent = getattr(command, "intent", None)
            if isinstance(command, StartServer):
                self.starts.append(command)
                self.pid += 1
                procs = (Proc(pid=self.pid, start_ticks=self.pid, role="server"),)
                self.feed(
                    EffectEnded(
                        intent=command.intent, ok=True, procs=procs, kept_arguments=self.kept_arguments
                    )
                )
            elif intent is not None:
                self.feed(EffectEnded(intent=intent, ok=True))
        return commands

    def until_serving(self) -> None:
        for _ in range(200):
            if self.server.state is ServerState.SERVING:
                return
            self.feed(Tick())
            if self.state.gate.order.value == "RESYNC":
                generation = self.state.gate.generation
                self.feed(OrderAcknowledged(generation=generation, order="RESYNC", ok=True))
            self.feed(ServerProbed(server="s", ready=Answer.OK, model_info=Answer.OK))
        raise AssertionError(self.server)

    def dies(self) -> None:
        self.feed(ProcessExited(server="s", proc=self.server.procs[0]))
        self.until_serving()

    def ran_short(self, shortage: Shortage) -> None:
        turn = Turn(self.state, Tick(), self.now)
        rungs.ran_short(turn, self.server, shortage)
        self.state, _ = turn.finish()


def started(**server: object) -> Run:
    run = Run(**server)
    run.feed(TreeSeen(server="s", procs=()))
    run.until_serving()
    return run


def test_a_death_for_want_of_memory_restarts_one_rung_down_and_tells_why_with_advice() -> None:
    run = started(climb=Climb(own=Limits(running=64), limits=Limits(running=64)))
    run.feed(OomSeen(kind=OomKind.KERNEL_CGROUP, role=Role.SERVER, server="s", pid=7))
    run.dies()
    assert run.starts[-1].arguments == (("--max-running-requests", "32"),)
    incident = run.state.incident or run.state.last_incident
    assert incident is not None
    told = " ".join(incident.actions)
    assert "s ran out of host memory: max_running_requests 64 → 32" in told
    assert "advice for the trainer: lower max_concurrent_rollouts to 32" in told
    assert run.server.short is None, "one shortage is one rung"


def test_a_death_without_a_shortage_keeps_the_arguments_and_one_in_probation_takes_a_rung() -> None:
    run = started(climb=Climb(own=Limits(running=64), limits=Limits(running=64)))
    run.dies()
    assert run.starts[-1].arguments == ()
    run.dies()  # the probation has not passed: no step was committed
    assert run.starts[-1].arguments == (("--max-running-requests", "32"),)


def test_a_refused_rung_is_told_and_the_server_restarted_as_it_was() -> None:
    limits = Limits(mem_fraction=0.8, running=8, prefill_tokens=512)
    run = started(climb=Climb(own=limits, limits=limits), sizes=BIG)
    run.ran_short(Shortage.GPU_RUN)
    run.dies()
    assert run.starts[-1].arguments == ()
    incident = run.state.incident or run.state.last_incident
    assert incident is not None
    assert "0.7 refused: weights 60.0 GiB" in " ".join(incident.actions)


def test_the_window_is_wide_enough_for_this_servers_own_start() -> None:
    server = Server(name="s", managed=True, longest_start_s=600.0)
    assert server.window_s(Settings()) == pytest.approx(3 * (600 + 60) * 1.5)
    assert Server(name="s", managed=True).window_s(Settings()) == 900.0


def test_a_server_inside_the_trainer_is_made_anew_by_the_order_resync() -> None:
    run = Run(hands=Hands.TRAINER)
    run.feed(TreeSeen(server="s", procs=()))
    assert run.starts == [], "not ours to start"
    run.feed(ServerProbed(server="s", ready=Answer.OK, model_info=Answer.OK))
    assert run.server.state is ServerState.SERVING
    run.feed(trainer(handles_resync=True))
    run.feed(TreeSeen(server="s", procs=(Proc(pid=5, start_ticks=5, role="server"),)))
    commands = run.feed(ProcessExited(server="s", proc=run.server.procs[0]))
    assert not any(isinstance(command, StopServer | StartServer) for command in commands)
    assert run.state.gate.order.value == "RESYNC"
    run.feed(OrderAcknowledged(generation=run.state.gate.generation, order="RESYNC", ok=True))
    run.until_serving()
    assert run.state.gate.order.value == "GO"


def test_a_server_inside_a_trainer_that_cannot_make_it_anew_locks_the_run_out() -> None:
    run = Run(hands=Hands.TRAINER)
    run.feed(ServerProbed(server="s", ready=Answer.OK, model_info=Answer.OK))
    run.feed(trainer(handles_resync=False))
    run.feed(TreeSeen(server="s", procs=(Proc(pid=5, start_ticks=5, role="server"),)))
    run.feed(ProcessExited(server="s", proc=run.server.procs[0]))
    assert run.state.lockout is not None
    assert memory.arguments(run.server.climb) == ()


def trainer(*, handles_resync: bool) -> TrainerSeen:
    return TrainerSeen(
        pid=1,
        attempt=0,
        step=1,
        phase="HELD",
        beats=1,
        progress=1,
        acked_generation=0,
        weight_version=None,
        handles_resync=handles_resync,
        handles_rollback=False,
        handles_save=False,
    )


def test_a_full_kv_pool_is_no_shortage_and_every_other_kind_is() -> None:
    for kind in OomKind:
        run = started()
        run.feed(OomSeen(kind=kind, role=Role.SERVER, server="s"))
        assert (run.server.short is None) == (kind is OomKind.KV_FULL)


def test_a_rung_that_could_not_be_taken_is_told_with_its_cause() -> None:
    run = started(climb=Climb(own=Limits(running=64), limits=Limits(running=64)))
    run.kept_arguments = "cannot write the drop-in"
    run.feed(OomSeen(kind=OomKind.KERNEL_CGROUP, role=Role.SERVER, server="s"))
    run.dies()
    incident = run.state.incident or run.state.last_incident
    assert incident is not None
    assert "s runs with its old arguments: cannot write the drop-in" in incident.actions
