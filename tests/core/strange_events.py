"""Events as no sane world sends them, and worlds brought into any state: for the properties."""

import math

from hypothesis import strategies as st

from stepguardd.core.events import (
    Answer,
    BatchReported,
    CallsHung,
    CheckpointGone,
    CheckpointPinned,
    CheckpointSaved,
    CheckpointVetted,
    DaemonStarted,
    EffectEnded,
    Event,
    GenerationAsked,
    GpuTrouble,
    GpuTroubled,
    LogRead,
    LogSeen,
    MemoryPressed,
    NodeAcknowledged,
    NodeJoined,
    NodeLost,
    OomKind,
    OomSeen,
    OperatorAsked,
    OrderAcknowledged,
    Proc,
    ProcessExited,
    RequestsFailed,
    RewardLogged,
    Role,
    RolloutsLost,
    SchedulerAsked,
    ServerProbed,
    StepCommitted,
    Tick,
    TrainerExited,
    TrainerLeft,
    TrainerSeen,
    TrainerTree,
    TreeSampled,
    TreeSeen,
)
from stepguardd.core.signs import Sign

NAMES = ("a", "b", "nobody")
ORDERS = ("GO", "HOLD", "RESYNC", "ROLLBACK", "SAVE", "STOP", "DANCE")
VERSIONS = (None, "v0", "v1", "7", "8", "", "base", "é\U0001f600")

names = st.sampled_from(NAMES)
versions = st.sampled_from(VERSIONS)
small = st.integers(min_value=0, max_value=12)
counts = st.one_of(small, st.sampled_from([10**6, 2**62]))
rewards = st.one_of(
    st.none(),
    st.sampled_from([0.0, -0.0, 1.0, 0.7, math.nan, math.inf, -math.inf, -1e308, 1e308, 5e-324]),
    st.floats(min_value=-2, max_value=2),
)
metrics = st.dictionaries(
    st.sampled_from(["loss", "grad_norm", "entropy", "kl", "aborted_ratio", "logprob_diff", "other"]),
    st.one_of(st.floats(allow_nan=True), st.just(0.1)),
    max_size=4,
)
procs = st.lists(
    st.builds(
        Proc,
        pid=st.integers(min_value=1, max_value=6),
        start_ticks=st.integers(min_value=1, max_value=2),
        role=st.sampled_from(["server", "scheduler", "child", "detokenizer", "resource_tracker"]),
    ),
    max_size=4,
    unique_by=lambda known: known.pid,
).map(tuple)
answers = st.sampled_from(list(Answer))
intents = st.builds(
    lambda number, what: f"{number}-{what}",
    st.integers(min_value=1, max_value=40),
    st.sampled_from(["start", "stop", "canary", "push", "continue", "find-checkpoint", "?"]),
)

events: st.SearchStrategy[Event] = st.one_of(
    st.just(Tick()),
    st.builds(
        DaemonStarted,
        gate_order=st.sampled_from(ORDERS),
        gate_generation=st.integers(min_value=0, max_value=60),
        judged_batch=small,
    ),
    st.builds(TreeSeen, server=names, procs=procs),
    st.builds(
        ProcessExited,
        server=names,
        proc=procs.filter(bool).map(lambda found: found[0]),
        code=st.one_of(st.none(), st.just(-9)),
    ),
    st.builds(
        TreeSampled,
        server=names,
        stopped=st.lists(st.integers(min_value=1, max_value=6), max_size=3).map(tuple),
        cpu_s=st.sampled_from([0.0, 1.0, 2.0, 1e9, math.nan, -1.0]),
        uninterruptible=st.lists(st.integers(min_value=1, max_value=6), max_size=3).map(tuple),
    ),
    st.builds(
        ServerProbed,
        server=names,
        ready=answers,
        model_info=answers,
        metrics=answers,
        weight_version=versions,
        running=st.one_of(st.none(), small),
        tokens=st.one_of(st.none(), counts),
    ),
    st.builds(
        SchedulerAsked,
        server=names,
        info=answers,
        loads=answers,
        loads_stamp=st.sampled_from([None, 0.0, 1.0, 2.0, math.nan, math.inf]),
        waited_s=st.sampled_from([0.0, 3.0, 1e12, math.nan]),
    ),
    st.builds(
        GenerationAsked,
        server=names,
        answer=answers,
        waited_s=st.sampled_from([0.0, 1.0, 20.0, 1e12, math.nan]),
    ),
    st.builds(
        RequestsFailed,
        attempt=st.integers(min_value=0, max_value=3),
        in_a_row=counts,
        error=st.just("ConnectError"),
    ),
    st.builds(
        TrainerSeen,
        pid=st.integers(min_value=1, max_value=3),
        attempt=st.integers(min_value=0, max_value=3),
        step=st.one_of(st.none(), counts),
        phase=st.sampled_from(["ROLLOUT", "HELD", "TRAIN", "SYNC", "UNKNOWN"]),
        beats=small,
        progress=small,
        acked_generation=small,
        weight_version=versions,
        handles_resync=st.booleans(),
        handles_rollback=st.booleans(),
        handles_save=st.booleans(),
    ),
    st.builds(
        TrainerExited,
        pid=st.one_of(st.none(), st.integers(min_value=1, max_value=3)),
        code=st.sampled_from([None, 0, 1, -9, -15]),
        rank=st.sampled_from([None, None, 0, 3]),
    ),
    st.builds(NodeJoined, node=names, gate_order=st.sampled_from(ORDERS), gate_generation=small),
    st.builds(NodeAcknowledged, node=names, generation=small),
    st.builds(NodeLost, node=names, why=st.just("silent for 4 s")),
    st.builds(TrainerTree, procs=procs),
    st.builds(TrainerLeft, attempt=small, why=st.sampled_from(["finished", "stopped", "failed"])),
    st.builds(
        CheckpointVetted,
        attempt=small,
        step=counts,
        verdict=st.sampled_from(["good", "bad", "incomplete", "unknown"]),
        finding=st.just("whole"),
        reason=st.just(""),
        size_bytes=counts,
    ),
    st.builds(
        CheckpointPinned,
        attempt=small,
        step=counts,
        path=st.sampled_from([None, "/p"]),
        trouble=st.sampled_from(["", "full"]),
    ),
    st.builds(CheckpointGone, attempt=small, step=counts),
    st.builds(
        BatchReported,
        attempt=st.integers(min_value=0, max_value=3),
        step=counts,
        batch=st.integers(min_value=0, max_value=60),
        ok=counts,
        failed=counts,
        reward=rewards,
        reward_std=rewards,
        reward_min=rewards,
        reward_max=rewards,
        stale=small,
        refused=st.sampled_from([None, None, None, "failed_fraction", "stale_weights", "no_group", "?"]),
        began=st.one_of(st.none(), st.sampled_from([0.0, 1e12, math.nan, -math.inf])),
    ),
    st.builds(
        RolloutsLost,
        attempt=small,
        began=st.sampled_from([0.0, 1e12, math.nan, -math.inf]),
        lost=st.sampled_from([(), ("a",), ("a", "b")]),
        answered=st.sampled_from([(), ("a",), ("c",)]),
    ),
    st.builds(CallsHung, attempt=small, what=st.sampled_from(["", "reward"]), failed=counts, calls=counts),
    st.builds(
        StepCommitted,
        attempt=small,
        step=counts,
        reward=rewards,
        weight_version=versions,
        metrics=metrics,
    ),
    st.builds(
        CheckpointSaved,
        attempt=small,
        step=counts,
        path=st.sampled_from(["/c", "", "/é\0"]),
        norms=metrics,
    ),
    st.builds(
        OrderAcknowledged,
        generation=st.integers(min_value=0, max_value=80),
        order=st.sampled_from(ORDERS),
        ok=st.booleans(),
    ),
    st.builds(RewardLogged, step=counts, reward=rewards, metrics=metrics),
    st.builds(
        EffectEnded,
        intent=intents,
        ok=st.booleans(),
        procs=procs,
        target_step=st.one_of(st.none(), counts),
        target_path=st.sampled_from([None, "/c/1"]),
    ),
    st.builds(
        OperatorAsked,
        verb=st.sampled_from(
            ["pause", "resume", "rollback", "restart-server", "mode", "ack", "plan-server", "dance"]
        ),
        who=st.just("ada"),
        why=st.sampled_from(["", "why not"]),
        server=st.sampled_from([None, *NAMES]),
        before_step=st.one_of(st.none(), st.integers(min_value=-5, max_value=10)),
        mode=st.sampled_from([None, "shadow", "hold", "act", "?"]),
        for_s=st.sampled_from([None, 0.0, -1.0, 60.0, math.nan, math.inf]),
    ),
    st.builds(
        LogSeen,
        sign=st.sampled_from(Sign),
        server=st.one_of(st.none(), names),
        count=counts,
        position=st.sampled_from([None, "{}", "here"]),
    ),
    st.builds(LogRead, server=st.one_of(st.none(), names), position=st.sampled_from(["", "there"])),
    st.builds(
        OomSeen,
        kind=st.sampled_from(OomKind),
        role=st.sampled_from(Role),
        server=st.one_of(st.none(), names),
        pid=st.one_of(st.none(), small),
        used_bytes=st.one_of(st.none(), counts),
        cgroup=st.sampled_from([None, "", "/", "/a", "/a/b", "/ab"]),
        gpu=st.one_of(st.none(), small),
        count=small,
    ),
    st.builds(
        GpuTroubled,
        trouble=st.sampled_from(GpuTrouble),
        gpu=st.one_of(st.none(), small),
        number=st.one_of(st.none(), counts),
    ),
    st.builds(
        MemoryPressed,
        short=st.booleans(),
        some_10s=st.floats(allow_nan=True),
        full_10s=st.floats(allow_nan=True),
    ),
)
gaps = st.sampled_from([0.0, 0.0, 0.01, 0.25, 1.0, 3.5, 11.0, 70.0, 700.0, 4000.0])
