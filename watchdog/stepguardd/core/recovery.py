"""
The repair of one server, stage by stage.

    CONTINUE ──▶ CANARY                     a stopped process, if SIGCONT helps
    WATCH ─────▶ CANARY | STOP              soft evidence: gone again, or lasting
    STOP ─▶ BACKOFF ─▶ START ─▶ READY ─▶ CANARY ─▶ WEIGHTS ─▶ serving

A stage is left by the outcome of its effect, by evidence, or by its timeout; each wait ends in the next
stage, in another restart within the budget, or in a lockout.
A server that comes back, by whoever's hand, passes CANARY and WEIGHTS before it counts again: a restarted
server answers every probe and serves the base model.
"""

from dataclasses import replace

from . import budget, cluster, memory, planned, poison, rungs, unguarded, weights
from .commands import ContinueServer, RunCanary, StartServer, StopServer
from .events import Answer, EffectEnded, ServerProbed, TreeSampled
from .fleet import Remedy, Suspicion, current, well
from .giving_up import give_up
from .reasons import CONTRADICTIONS, Reason
from .state import Endpoints, Hands, Repair, Server, ServerState, Stage
from .turn import Turn

_ALIVE = frozenset(
    {ServerState.STARTING, ServerState.SERVING, ServerState.SUSPECT, ServerState.PLANNED, ServerState.STALE}
)
_SOFT = frozenset({Stage.CONTINUE, Stage.WATCH, Stage.CANARY, Stage.WEIGHTS})


def suspect(turn: Turn, server: Server, suspicion: Suspicion) -> None:
    """Act on a suspicion, unless the repair under way already covers it."""
    turn.put(server)
    match suspicion.remedy:
        case Remedy.RESTART:
            _died(turn, server, suspicion.reason)
        case Remedy.CONTINUE:
            _stopped(turn, server, suspicion.reason)
        case Remedy.WATCH:
            if server.repair is None and server.state is not ServerState.DEAD:
                _enter(turn, server, suspicion.reason, Stage.WATCH, ServerState.SUSPECT)
        case Remedy.RESYNC:
            if server.repair is None and server.state in _ALIVE:
                weights.prove(turn, _begun(turn, server, suspicion.reason, Stage.WEIGHTS, ServerState.STALE))
        case Remedy.RECHECK:
            if server.repair is None and server.state in _ALIVE:
                server = replace(server, weight_version=None)
                server = _begun(turn, server, suspicion.reason, Stage.WEIGHTS, ServerState.STALE)
                assert server.repair is not None
                again_at = turn.now + 2 * turn.state.settings.interval_s
                turn.put(replace(server, repair=replace(server.repair, again_at=again_at)))
        case Remedy.VERIFY:
            if server.repair is None or server.repair.stage in _SOFT:
                server = _returned(turn, server, suspicion.reason)
                _enter(turn, server, suspicion.reason, Stage.READY, ServerState.STARTING)


def verify(turn: Turn, server: Server, reason: Reason) -> None:
    """Look at a server that nothing speaks against: does it generate, with the right weights?"""
    states = {ServerState.STARTING, ServerState.SERVING, ServerState.SUSPECT}
    # A paused server lets requests wait; one whose requests fail is not paused.
    paused = server.state is ServerState.PLANNED and server.reason is Reason.SERVER_PAUSED
    doubted = paused and (reason is Reason.REQUESTS_FAILED or unguarded.paused(turn.state, server.name))
    if server.repair is None and (server.state in states or doubted):
        _canary(turn, _begun(turn, server, reason, Stage.CANARY, ServerState.SUSPECT))


def start_first(turn: Turn, server: Server) -> None:
    """The server's first start: nothing was lost, so no budget is spent and no incident told."""
    _start(turn, _begun(turn, server, Reason.SERVER_STARTING, Stage.START, ServerState.STARTING))


def restart(turn: Turn, server: Server, reason: Reason) -> None:
    """End the server's tree and start it anew, if the budget allows."""
    settings, now = turn.state.settings, turn.now
    if not server.managed:
        turn.note("call", reason, f"{server.name} is not ours to restart: {reason.value}")
        _enter(turn, server, reason, Stage.WATCH, server.state)
        return
    limit, window_s = settings.restart_budget, server.window_s(settings)
    if budget.left(server.budget, now=now, limit=limit, window_s=window_s) < 1:
        give_up(turn, server, Reason.RESTART_BUDGET_SPENT)
        return
    spent = budget.spend(server.budget, now=now, limit=limit, window_s=window_s)
    server = rungs.suspected(turn, server, reason)
    server = replace(server, budget=spent, restarts=server.restarts + 1)
    if server.hands is Hands.TRAINER:
        _rebuild(turn, server, reason)
        return
    repair = Repair(
        cause=reason, stage=Stage.STOP, since=now, began=now, intent=turn.intent("stop"), restarts=True
    )
    server = replace(server, repair=repair).move(ServerState.RESTARTING, now, reason)
    turn.put(server)
    turn.count("restarts")
    turn.note("action", reason, f"restarting {server.name}: {reason.value}")
    assert repair.intent is not None
    turn.commands.append(
        StopServer(
            intent=repair.intent, server=server.name, procs=server.procs, gpu_baseline=server.gpu_baseline
        )
    )


def _rebuild(turn: Turn, server: Server, reason: Reason) -> None:
    """A server inside the trainer: nobody else can make it anew, and the trainer only at a guard call."""
    if not turn.state.trainer.handles_resync:
        turn.note("call", reason, f"{server.name} lives in a trainer without on_resync: relaunch the trainer")
        give_up(turn, server, Reason.RESYNC_FAILED)
        return
    now = turn.now
    repair = Repair(
        cause=reason,
        stage=Stage.START,
        since=now,
        began=now,
        resync_generation=turn.state.gate.generation + 1,
        restarts=True,
        started_at=now,
        unseen=True,
    )
    server = replace(_unknown(server), procs=(), repair=repair)
    turn.put(server.move(ServerState.RESTARTING, now, reason))
    turn.count("restarts")
    turn.note("action", reason, f"asking the trainer to make {server.name} anew: {reason.value}")


def accept(turn: Turn, server: Server) -> None:
    """
    A person lets go: a server that lives is taken as it is, whatever speaks against it.

    A dead one gets a new budget where the daemon may restart it, and is named where it may not.
    """
    alive = server.state in {ServerState.SUSPECT, ServerState.STALE}
    if alive and (server.repair is None or server.repair.stage in _SOFT):
        if server.reason in CONTRADICTIONS:
            turn.state = replace(turn.state, answers=())  # what was known of the weights was wrong, then
        turn.put(replace(server, repair=None).move(ServerState.SERVING, turn.now, None))
    elif server.state is ServerState.DEAD and server.repair is None and server.managed:
        reason = server.reason or Reason.SERVER_DIED
        if turn.may_act(reason):
            restart(turn, replace(server, budget=budget.Budget()), reason)
        else:
            turn.note("call", reason, f"{server.name} is dead: stepguard restart-server {server.name}")


def effect_ended(turn: Turn, server: Server, event: EffectEnded) -> None:
    """The outcome of the effect that the repair waits for; any other outcome is out of date."""
    repair = server.repair
    if repair is None or repair.intent != event.intent:
        return
    match repair.stage:
        case Stage.CONTINUE:
            turn.put(replace(server, repair=replace(repair, intent=None, changed=repair.changed or event.ok)))
        case Stage.STOP:
            _stop_ended(turn, server, repair, event)
        case Stage.START:
            _start_ended(turn, server, repair, event)
        case Stage.CANARY:
            _canary_ended(turn, server, repair, event)
        case Stage.WEIGHTS:
            weights.effect_ended(turn, server, repair, event)
        case Stage.WATCH | Stage.BACKOFF | Stage.READY:
            pass


def probed(turn: Turn, server: Server, event: ServerProbed) -> None:
    """A round of probes may end READY, prove the weights after a re-sync, or find them current after all."""
    repair = server.repair
    if repair is None:
        trainer, settings = turn.state.trainer, turn.state.settings
        known = server.weight_version is not None and trainer.weight_version is not None
        fresh = known and current(server.weight_version, trainer.weight_version, settings.max_staleness)
        if server.state is ServerState.STALE and fresh and server.reason not in CONTRADICTIONS:
            _canary(turn, _begun(turn, server, Reason.SERVER_RETURNED, Stage.CANARY, ServerState.STALE))
        return
    up = event.model_info is Answer.OK and event.ready in {Answer.OK, Answer.NOT_OFFERED}
    ours = server.managed and server.hands is Hands.OWN and not repair.unseen
    if repair.stage is Stage.READY and up and (server.procs or not ours):
        took_s = 0.0 if repair.started_at is None else turn.now - repair.started_at
        _canary(turn, replace(server, longest_start_s=max(server.longest_start_s, took_s)))
    elif repair.stage is Stage.WEIGHTS and repair.intent is None:
        if event.model_info is Answer.OK and not repair.push_failed:
            server = replace(server, repair=replace(repair, again_at=None))
            turn.put(server)
        if event.model_info is Answer.OK or weights.again(turn, repair):
            weights.prove(turn, server)


def sampled(turn: Turn, server: Server, event: TreeSampled) -> None:
    """A tree that runs again, after SIGCONT or by itself, is proven before it serves."""
    repair = server.repair
    if repair is not None and repair.stage is Stage.CONTINUE and not event.stopped and repair.intent is None:
        _canary(turn, server)


def _try_again(turn: Turn, server: Server) -> None:
    """A server that was given up, while the run goes on without it: once its whole budget is there again."""
    settings, reason = turn.state.settings, server.reason or Reason.SERVER_DIED
    if server.state is not ServerState.DEAD or not server.managed or turn.state.lockout is not None:
        return
    limit = settings.restart_budget
    left = budget.left(server.budget, now=turn.now, limit=limit, window_s=server.window_s(settings))
    if 0 < limit <= left and turn.may_act(reason):
        restart(turn, server, reason)


def ticked(turn: Turn, server: Server) -> None:
    """The timeouts of each stage, and another try of a server that was left out."""
    repair, settings = server.repair, turn.state.settings
    if cluster.away(turn.state, server):
        return  # what was asked of its agent is asked again when the machine is back
    if repair is None:
        _try_again(turn, server)
        return
    waited_s = turn.now - max(repair.since, cluster.in_reach_since(turn.state, server))
    match repair.stage:
        case Stage.CONTINUE:
            if waited_s > settings.cont_grace_s:
                _enter(turn, server, repair.cause, Stage.WATCH, ServerState.SUSPECT)
        case Stage.WATCH:
            _watch(turn, server, repair)
        case Stage.STOP:
            if waited_s > 4 * settings.stop_timeout_s + settings.gpu_free_timeout_s:
                give_up(turn, server, Reason.STOP_FAILED)
        case Stage.BACKOFF:
            if waited_s >= _wait_s(turn, server):
                _start(turn, server)
        case Stage.START | Stage.READY:
            if waited_s > settings.start_timeout_s:
                longest_s = max(server.longest_start_s, waited_s)
                _failed(turn, replace(server, longest_start_s=longest_s), Reason.START_FAILED)
        case Stage.CANARY:
            if repair.intent is None:
                if weights.again(turn, repair):
                    _canary(turn, server)
            elif waited_s > 2 * settings.canary_timeout_s:
                _failed(turn, server, Reason.CANARY_FAILED)
        case Stage.WEIGHTS:
            if weights.waited(turn, server, repair):
                _failed(turn, server, Reason.WEIGHTS_UNPROVEN)


def _died(turn: Turn, server: Server, reason: Reason) -> None:
    repair = server.repair
    if repair is not None and repair.stage in {Stage.STOP, Stage.BACKOFF, Stage.START}:
        return  # it is being restarted: what ends now is the old tree
    server = replace(server, repair=None)
    if server.state is ServerState.DEAD:
        turn.put(server)
        return
    server = server.move(ServerState.DEAD, turn.now, reason)
    turn.put(server)
    if reason is Reason.SERVER_DIED:
        poison.crashed(turn)
    if cluster.away(turn.state, server):
        return  # until its machine is back
    if server.managed and turn.may_act(repair.cause if repair is not None else reason):
        restart(turn, server, reason)
    elif server.managed:
        turn.note("would", reason, f"would restart {server.name} in mode act")


def in_reach(turn: Turn, server: Server) -> None:
    """Its machine may be back: a server that died meanwhile, or with it, is started again."""
    reason = server.reason or Reason.SERVER_DIED
    waits = server.state is ServerState.DEAD and server.repair is None and server.managed
    if cluster.away(turn.state, server) or turn.state.lockout is not None:
        return
    if waits and turn.may_act(reason):
        restart(turn, server, reason)


def _stopped(turn: Turn, server: Server, reason: Reason) -> None:
    if server.repair is not None and server.repair.stage not in {Stage.CANARY, Stage.READY, Stage.WEIGHTS}:
        return
    if not turn.may_act(reason) or cluster.away(turn.state, server):
        if server.repair is None:
            _enter(turn, server, reason, Stage.WATCH, ServerState.SUSPECT)
            turn.note("would", reason, f"{server.name} is stopped: would send SIGCONT in mode act")
        return
    server = _begun(turn, server, reason, Stage.CONTINUE, ServerState.SUSPECT)
    intent = turn.intent("continue")
    assert server.repair is not None
    server = replace(server, repair=replace(server.repair, intent=intent))
    turn.put(server)
    turn.note("action", reason, f"{server.name} is stopped: sending SIGCONT")
    procs = tuple(proc for proc in server.procs if proc.pid in server.stopped)
    turn.commands.append(ContinueServer(intent=intent, server=server.name, procs=procs))


def _watch(turn: Turn, server: Server, repair: Repair) -> None:
    settings = turn.state.settings
    if server.state is ServerState.DEAD:
        return
    if well(server, settings, turn.now):
        _canary(turn, _begun(turn, server, repair.cause, Stage.CANARY, server.state))
    elif turn.now - repair.began > settings.kill_after_s and server.managed:
        if turn.may_act(repair.cause):
            restart(turn, server, repair.cause)
        elif not repair.called:
            turn.put(replace(server, repair=replace(repair, called=True)))
            turn.note("would", repair.cause, f"would restart {server.name} in mode act")


def _begun(turn: Turn, server: Server, reason: Reason, stage: Stage, to: ServerState) -> Server:
    """The server with its repair in a stage; how long the trouble lasts and what was done for it are kept."""
    old = server.repair
    repair = Repair(
        cause=reason if old is None else old.cause,
        stage=stage,
        since=turn.now,
        began=turn.now if old is None else old.began,
        changed=old is not None and old.changed,
        restarts=old is not None and old.restarts,
    )
    server = replace(server, repair=repair).move(to, turn.now, repair.cause)
    turn.put(server)
    return server


def _enter(turn: Turn, server: Server, reason: Reason, stage: Stage, to: ServerState) -> None:
    _begun(turn, server, reason, stage, to)


def _returned(turn: Turn, server: Server, reason: Reason) -> Server:
    """Another server where the old one was: nothing that was known of the old one holds for it."""
    server = _unknown(server)
    if server.state not in {ServerState.STARTING, ServerState.DEAD}:
        server = server.move(ServerState.DEAD, turn.now, reason)
    return server.move(ServerState.STARTING, turn.now, reason)


def _unknown(server: Server) -> Server:
    """The server without what was read of a process that is gone."""
    return replace(
        server,
        weight_version=None,
        newest=None,
        older_probes=0,
        failed_probes=0,
        stale_probes=0,
        running=None,
        tokens=None,
        tokens_at=None,
        endpoints=Endpoints(),
        ready_doubted=False,
        generated_at=None,
        doubted=False,
        loop_at=None,
        loads_stamp=None,
        unanswered_since=None,
        health_due=False,
        health_at=None,
        failed_health=0,
        planned_until=None,
        owes_proof=False,
        stopped=(),
        cpu_s=None,
        sampled_at=None,
        busy_at=None,
    )


def _wait_s(turn: Turn, server: Server) -> float:
    settings = turn.state.settings
    return budget.wait_s(
        server.budget,
        first_s=settings.backoff_first_s,
        max_s=settings.backoff_max_s,
        jitter=settings.backoff_jitter,
    )


def _stop_ended(turn: Turn, server: Server, repair: Repair, event: EffectEnded) -> None:
    if not event.ok:
        turn.note("call", Reason.STOP_FAILED, f"{server.name} would not end: {event.detail}")
        give_up(turn, server, Reason.STOP_FAILED)
        return
    if event.memory_held is not None:
        turn.note("call", Reason.GPU_HELD, f"{server.name} starts although {event.memory_held}")
    server = replace(
        server,
        procs=(),
        repair=replace(repair, stage=Stage.BACKOFF, since=turn.now, intent=None, changed=True),
    )
    turn.put(server)
    if _wait_s(turn, server) <= 0.0:
        _start(turn, server)


def _start(turn: Turn, server: Server) -> None:
    assert server.repair is not None
    intent = turn.intent("start")
    if server.repair.restarts:
        server = rungs.chosen(turn, server, server.repair.cause)
    repair = server.repair
    assert repair is not None
    repair = replace(repair, stage=Stage.START, since=turn.now, intent=intent, started_at=turn.now)
    turn.put(replace(_unknown(server), repair=repair))
    turn.commands.append(
        StartServer(intent=intent, server=server.name, arguments=memory.arguments(server.climb))
    )


def _start_ended(turn: Turn, server: Server, repair: Repair, event: EffectEnded) -> None:
    if not event.ok:
        turn.note("call", Reason.START_FAILED, f"{server.name} did not start: {event.detail}")
        _failed(turn, server, Reason.START_FAILED)
        return
    if event.kept_arguments is not None:
        turn.note("call", repair.cause, f"{server.name} runs with its old arguments: {event.kept_arguments}")
    repair = replace(repair, stage=Stage.READY, since=turn.now, intent=None, unseen=not event.procs)
    server = replace(server, procs=event.procs, gpu_baseline=event.gpu_baseline, repair=repair)
    turn.put(server.move(ServerState.STARTING, turn.now, repair.cause))


def _canary(turn: Turn, server: Server) -> None:
    repair = server.repair
    assert repair is not None
    if planned.hands_off(turn.state.trainer, turn.state.settings) and not repair.restarts:
        # Its memory may be the trainer's now: it is proven when the rollouts begin.
        server = replace(server, repair=None, owes_proof=True)
        turn.put(server.move(ServerState.PLANNED, turn.now, Reason.SERVER_OFFLOADED))
        return
    since = repair.since if repair.stage is Stage.CANARY else turn.now
    lifting = unguarded.paused(turn.state, server.name)
    if lifting and turn.now - since < turn.state.settings.canary_timeout_s:
        again_at = turn.now + turn.state.settings.interval_s / 4
        waiting = replace(repair, stage=Stage.CANARY, since=since, intent=None, again_at=again_at)
        turn.put(replace(server, repair=waiting))
        return
    intent = turn.intent("canary")
    repair = replace(repair, stage=Stage.CANARY, since=since, intent=intent)
    turn.put(replace(server, repair=repair))
    turn.commands.append(RunCanary(intent=intent, server=server.name))


def _canary_ended(turn: Turn, server: Server, repair: Repair, event: EffectEnded) -> None:
    settings = turn.state.settings
    if event.ok:
        to = ServerState.STALE if server.state is not ServerState.PLANNED else server.state
        weights.prove(turn, _begun(turn, server, repair.cause, Stage.WEIGHTS, to))
        return
    if turn.now - repair.since < max(settings.canary_timeout_s, settings.kill_after_s):
        # Not yet lasting: a tick soon sends another.
        again_at = turn.now + settings.interval_s
        turn.put(replace(server, repair=replace(repair, intent=None, again_at=again_at)))
        return
    turn.note("action", Reason.CANARY_FAILED, f"{server.name} does not generate: {event.detail}")
    _failed(turn, server, Reason.CANARY_FAILED)


def _failed(turn: Turn, server: Server, reason: Reason) -> None:
    """A stage did not come to its end: another restart, where the daemon may."""
    cause = server.repair.cause if server.repair is not None else reason
    if turn.may_act(cause) and server.managed:
        restart(turn, replace(server, repair=None), reason)
    else:
        _enter(turn, replace(server, repair=None), reason, Stage.WATCH, ServerState.SUSPECT)
