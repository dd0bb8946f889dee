"""The last stage of a server's repair: its weights are proven current, or made so, or it does not serve."""

from dataclasses import replace

from . import holding, proof, relaunch, stall, unguarded
from .breaker import Phase
from .commands import AbortRequests, CompareWeights, PushWeights
from .events import Answer, EffectEnded, OrderAcknowledged, ServerProbed, WeightsLook
from .fleet import STALE_PROBES, Remedy, Suspicion, current
from .giving_up import give_up
from .reasons import Reason
from .state import Mode, Newest, Repair, Server, ServerState, Stage
from .turn import Turn

RESYNC_TRIES = 3
ABORTS_APART = 2
_NO_ROLLOUTS = frozenset({"HELD", "SYNC"})


def prove(turn: Turn, server: Server) -> None:
    """
    Prove the served weights current, or make them so.

    In this order: the version that the server offers, a push of the trainer's own weights from disk, a
    RESYNC by the trainer, a new trainer. A run without any of them waits, and ends locked out: never on a
    guess.
    """
    repair, trainer, settings = server.repair, turn.state.trainer, turn.state.settings
    assert repair is not None
    if repair.intent is not None or repair.resync_generation is not None:
        return
    if unguarded.paused(turn.state, server.name):
        return  # being lifted: SGLang 0.5.23 dies of two loads into a paused server
    if _unguarded(turn, repair):
        _prove_unguarded(turn, server, repair)
        return
    nobody = trainer.pid is None or trainer.alive is False
    unannounced = repair.cause is Reason.SERVER_STARTING and trainer.weight_version is None
    if settings.weights_fixed or nobody or unannounced:
        serve(turn, server)  # nobody holds other weights yet: the trainer pushes its own when it starts
        return
    known = server.weight_version is not None and trainer.weight_version is not None
    fresh = known and current(server.weight_version, trainer.weight_version, settings.max_staleness)
    if fresh and not repair.distrusted:
        _confirm(turn, server, repair)
        return
    if turn.state.mode is Mode.SHADOW:
        if not known:
            serve(turn, server)  # nothing more can be learned by looking on
        elif not repair.called:
            turn.put(replace(server, repair=replace(repair, called=True)))
            how = f"load version {trainer.weight_version} into" if settings.push_weights else "re-sync"
            turn.note("would", repair.cause, f"would {how} {server.name} in mode hold")
        return
    push = settings.push_weights and trainer.weight_version is not None
    if push and not (repair.push_failed and trainer.handles_resync) and again(turn, repair):
        assert trainer.weight_version is not None
        intent = turn.intent("push")
        version = trainer.weight_version
        turn.put(replace(server, repair=replace(repair, intent=intent, pushing=version)))
        turn.commands.append(
            PushWeights(intent=intent, server=server.name, version=version, anew=repair.distrusted)
        )
    elif trainer.handles_resync and (not push or repair.push_failed) and _may_resync(turn, repair):
        generation = turn.state.gate.generation + 1
        turn.put(replace(server, repair=replace(repair, resync_generation=generation)))
    elif repair.restarts or repair.cause is Reason.SERVER_RETURNED:
        _by_a_new_trainer(turn)


def _by_a_new_trainer(turn: Turn) -> bool:
    """
    Whether the trainer is started again, because this one has no way to bring its weights to a new process.

    One that pushes over NCCL or IPC and has no `on_resync`: the group of its start is gone with the old
    process. Not for one server of several that the run can do without.
    """
    trainer, settings = turn.state.trainer, turn.state.settings
    able = trainer.handles_resync or (settings.push_weights and trainer.weight_version is not None)
    allowed = settings.trainer_managed and turn.may_act(Reason.WEIGHTS_UNPROVEN)
    if able or not allowed or holding.why_down(turn.state) is None:
        return False
    return relaunch.begin(turn, Reason.WEIGHTS_UNPROVEN)


def _unguarded(turn: Turn, repair: Repair) -> bool:
    """Whether a new process serves a trainer without the guard, which names no version as its own."""
    anew = repair.restarts or repair.cause is Reason.SERVER_RETURNED
    fixed = turn.state.settings.weights_fixed or turn.state.trainer.alive is False
    return anew and not fixed and unguarded.known(turn.state)


def _prove_unguarded(turn: Turn, server: Server, repair: Repair) -> None:
    """
    The newest version that was served has to stand for the trainer's own.

    It is loaded where it lies on the disk, and compared with what another server of it shows; where neither
    proves anything the server serves all the same, and people are told: the run is not held by its page.
    """
    newest = proof.newest([*_theirs(turn, server), server.served_version])
    behind = server.weight_version != newest or repair.distrusted
    acts = turn.state.mode is not Mode.SHADOW
    if acts and behind and newest is not None and turn.state.settings.push_weights and not repair.push_failed:
        intent = turn.intent("push")
        turn.put(replace(server, repair=replace(repair, intent=intent, pushing=newest)))
        turn.commands.append(
            PushWeights(intent=intent, server=server.name, version=newest, anew=repair.distrusted)
        )
    elif acts and not repair.compared and server.weight_version is not None:
        _compare(turn, server, repair)
    else:
        _serve_unguarded(turn, server, repair)


def _theirs(turn: Turn, server: Server) -> list[str]:
    """What the other servers serve."""
    others = (one for one in turn.state.servers if one.name != server.name)
    return sorted({one.weight_version for one in others if one.usable and one.weight_version is not None})


def _unguarded_compared(
    turn: Turn, server: Server, repair: Repair, own: WeightsLook, peer: WeightsLook | None
) -> None:
    """The other server was not restarted: if the two differ, this one is wrong."""
    found = proof.contradiction(own, peer, None)
    if found is not None and turn.state.settings.push_weights and not repair.contradicted:
        turn.note("call", found.reason, found.text)
        _distrust(turn, server, repair, found.reason)
        return
    repair = replace(repair, compared=True, vouched=repair.vouched or proof.alike(own, peer))
    repair = replace(repair, vouched=repair.vouched and found is None)
    _serve_unguarded(turn, replace(server, repair=repair), repair, "" if found is None else found.text)


def _serve_unguarded(turn: Turn, server: Server, repair: Repair, against: str = "") -> None:
    if not repair.vouched:
        theirs = _theirs(turn, server)
        beside = f"; the others serve {', '.join(theirs[:3])}" if theirs else ""
        version = server.weight_version
        served = "an unnamed version" if version is None else f"version {version}"
        why = against or "nothing proves it, because the trainer has no guard"
        turn.note(
            "call",
            Reason.WEIGHTS_UNPROVEN,
            f"{server.name} serves {served} after its restart{beside}: {why}; "
            "rollouts are of these weights until it pushes its own",
        )
    serve(turn, server)


def again(turn: Turn, repair: Repair) -> bool:
    """Whether what failed may be tried again now."""
    return repair.again_at is None or turn.now >= repair.again_at


def _may_resync(turn: Turn, repair: Repair) -> bool:
    """Not before the probe that would show an acknowledged RESYNC, nor soon after a failed one."""
    at, again_at = repair.resynced_at, repair.resync_again_at
    shown = at is None or turn.now - at >= 3 * turn.state.settings.interval_s
    return shown and (again_at is None or turn.now >= again_at)


def acknowledged(turn: Turn, server: Server, event: OrderAcknowledged) -> None:
    """The trainer answered a RESYNC: where a version is offered, the next probe has the last word."""
    repair = server.repair
    if repair is None or repair.resync_generation is None or event.generation < repair.resync_generation:
        return
    if event.order != "RESYNC":
        return
    if not event.ok:
        _resync_failed(turn, server, repair, event.detail)
        return
    repair = replace(
        repair,
        resync_generation=None,
        changed=True,
        resynced_at=turn.now,
        compared=False,
        distrusted=False,
    )
    server = replace(server, repair=repair)
    turn.put(server)
    if repair.stage is Stage.START:  # the trainer made it anew; whether it serves, the probes will tell
        server = replace(server, repair=replace(repair, stage=Stage.READY, since=turn.now))
        turn.put(server.move(ServerState.STARTING, turn.now, repair.cause))
        return
    turn.count("resyncs")
    turn.note("action", repair.cause, f"weights of {server.name} re-synced by the trainer")
    if server.weight_version is None or turn.state.trainer.weight_version is None:
        serve(turn, server)


def _resync_failed(turn: Turn, server: Server, repair: Repair, detail: str) -> None:
    """A trainer that could not may be able to in a while: what it copies from or to can come back."""
    failed = repair.resyncs_failed + 1
    if failed >= RESYNC_TRIES or repair.stage is Stage.START:
        give_up(turn, server, Reason.RESYNC_FAILED)
        return
    wait_s = turn.state.settings.backoff_first_s * 2 ** (failed - 1)
    repair = replace(repair, resync_generation=None, resyncs_failed=failed, resync_again_at=turn.now + wait_s)
    turn.put(replace(server, repair=repair))
    turn.note(
        "action",
        repair.cause,
        f"the trainer could not re-sync {server.name}: {detail}; again in {wait_s:g} s",
    )


def _confirm(turn: Turn, server: Server, repair: Repair) -> None:
    """The version is right. Whether the weights are the ones of that name, they have to show themselves."""
    if repair.compared or turn.state.mode is Mode.SHADOW:
        serve(turn, server)
        return
    others = [one for one in turn.state.servers if one.name != server.name]
    if repair.contradicted and any(one.repair is not None and one.repair.distrusted for one in others):
        return  # the other one of the two is being loaded anew: then they can be compared again
    _compare(turn, server, repair)


def _compare(turn: Turn, server: Server, repair: Repair) -> None:
    like = (
        one.name
        for one in turn.state.servers
        if one.name != server.name and one.weight_version == server.weight_version
        if _comparable(one) and not unguarded.paused(turn.state, one.name)
    )
    other = next(like, None)
    intent = turn.intent("compare")
    turn.put(replace(server, repair=replace(repair, intent=intent, comparing=True, since=turn.now)))
    turn.commands.append(CompareWeights(intent=intent, server=server.name, other=other))


def _comparable(server: Server) -> bool:
    again = server.repair is not None and server.repair.contradicted and not server.repair.distrusted
    return server.state is ServerState.SERVING or again


def effect_ended(turn: Turn, server: Server, repair: Repair, event: EffectEnded) -> None:
    """A push has ended, or a look at the weights."""
    if repair.comparing:
        _compared(turn, server, replace(repair, intent=None, comparing=False), event.looks)
    else:
        _push_ended(turn, server, repair, event)


def _compared(turn: Turn, server: Server, repair: Repair, looks: tuple[WeightsLook, ...]) -> None:
    """What could not be learned speaks neither for the weights nor against them."""
    own = looks[0] if looks else WeightsLook(server=server.name)
    peer = looks[1] if len(looks) > 1 else None
    attempt = turn.state.trainer.attempt
    if own.version is None or own.version != server.weight_version:
        # Unknown, or the trainer pushed another meanwhile: the version still has the word.
        _go_on(turn, server, replace(repair, compared=own.version is None))
        return
    if _unguarded(turn, repair):
        _unguarded_compared(turn, server, repair, own, peer)
        return
    known = proof.answer(turn.state.answers, attempt, own.version)
    found = proof.contradiction(own, peer, known)
    if found is not None:
        _contradicted(turn, server, repair, found)
        return
    if not repair.contradicted:  # of two that contradicted each other either may have been wrong
        answers = proof.learned(turn.state.answers, attempt, own.version, own.greedy)
        turn.state = replace(turn.state, answers=answers)
    _go_on(turn, server, replace(repair, compared=True))


def _go_on(turn: Turn, server: Server, repair: Repair) -> None:
    server = replace(server, repair=repair)
    turn.put(server)
    prove(turn, server)


def _contradicted(turn: Turn, server: Server, repair: Repair, found: proof.Contradiction) -> None:
    """Loaded anew, once: the server, and the other one too where nobody can tell which of them is wrong."""
    reason = found.reason
    turn.note("call", reason, found.text)
    if repair.contradicted:
        turn.put(replace(server, repair=repair))
        give_up(turn, server.move(ServerState.STALE, turn.now, reason), reason)
        return
    _distrust(turn, server, repair, reason)
    other = None if found.peer is None else turn.server(found.peer)
    if other is not None and other.state is ServerState.SERVING:
        fresh = Repair(cause=reason, stage=Stage.WEIGHTS, since=turn.now, began=turn.now)
        _distrust(turn, other, fresh, reason)


def _distrust(turn: Turn, server: Server, repair: Repair, reason: Reason) -> None:
    repair = replace(
        repair, cause=reason, since=turn.now, push_failed=False, distrusted=True, contradicted=True
    )
    server = replace(server, repair=repair).move(ServerState.STALE, turn.now, reason)
    turn.put(server)
    prove(turn, server)


def version_seen(turn: Turn, server: Server, event: ServerProbed) -> tuple[Server, Suspicion | None]:
    """
    A server's version may stay or rise within an attempt; two looks running at an older one are no accident.

    Unknown without a trainer's page, which alone tells attempts apart: a version beyond the trainer's own was
    pushed by the trainer that died before it, and its going is no way back. Nothing is said while a rollback,
    a relaunch or the server's own repair puts weights where they belong.
    """
    trainer, version = turn.state.trainer, event.weight_version
    if version is not None and server.state is ServerState.SERVING:
        server = replace(server, served_version=version)
    settled = turn.state.rollback is None and turn.state.relaunch is None and server.repair is None
    serving = server.state is ServerState.SERVING
    if version is None or trainer.pid is None or trainer.alive is False or not (settled and serving):
        return server, None
    if trainer.weight_version is None or proof.older(trainer.weight_version, version):
        return server, None
    newest = server.newest
    if newest is None or (newest.pid, newest.attempt) != (trainer.pid, trainer.attempt):
        newest = Newest(pid=trainer.pid, attempt=trainer.attempt, version=version)
    went_back = proof.older(version, newest.version)
    if not went_back:
        newest = replace(newest, version=version)
        return replace(server, newest=newest, older_probes=0), None
    server = replace(server, newest=newest, older_probes=server.older_probes + 1)
    if server.older_probes < STALE_PROBES:
        return server, None
    turn.note(
        "call",
        Reason.VERSION_WENT_BACK,
        f"{server.name} went back from version {newest.version} to {version} within one attempt",
    )
    # Told once; from here on this is what it serves.
    server = replace(server, newest=replace(newest, version=version), older_probes=0)
    return server, Suspicion(reason=Reason.VERSION_WENT_BACK, remedy=Remedy.RESYNC)


def _push_ended(turn: Turn, server: Server, repair: Repair, event: EffectEnded) -> None:
    """A push that the server confirms is proof; one that failed is tried again, or left to the trainer."""
    repair = replace(
        repair,
        intent=None,
        changed=repair.changed or (event.ok and not event.needless),
        push_failed=not event.ok,
        vouched=event.ok and _unguarded(turn, repair),
        compared=repair.compared and not event.ok,
        distrusted=repair.distrusted and not event.ok,
        again_at=None if event.ok else turn.now + turn.state.settings.interval_s,
    )
    server = replace(server, repair=repair)
    turn.put(server)
    if not event.ok:
        if not repair.called:
            turn.put(replace(server, repair=replace(repair, called=True)))
            turn.note("call", repair.cause, f"weights of {server.name} could not be pushed: {event.detail}")
    else:
        turn.count("resyncs")
        turn.note("action", repair.cause, f"weights of {server.name} pushed from disk: {event.detail}")
        # The trainer may have gone on meanwhile, where other servers serve it: then these are old already.
        prove(turn, replace(server, weight_version=repair.pushing))


def waited(turn: Turn, server: Server, repair: Repair) -> bool:
    """
    Proving the weights takes its time, and no longer: whether a new process is to be tried.

    A trainer that was asked can answer in a guard call alone: one in a long step or rollout is told of to a
    person, and neither locked out nor ended for that before it is as good as hung.
    """
    settings, trainer = turn.state.settings, turn.state.trainer
    nobody = trainer.alive is False or turn.state.mode is Mode.SHADOW
    if repair.resync_generation is not None and nobody:
        repair = replace(repair, resync_generation=None, since=turn.now)
        server = replace(server, repair=repair)
        turn.put(server)
    since = repair.since
    if repair.resync_generation is not None and trainer.phase == "HELD":
        since = max(since, trainer.phase_at or since)
    if _fails_slowly(turn, server, repair):
        repair = replace(repair, aborted_at=turn.now)
        server = replace(server, repair=repair)
        turn.put(server)
        turn.commands.append(AbortRequests(intent=turn.intent("abort"), server=server.name))
    late = turn.now - since > settings.resync_timeout_s
    if late and turn.may_act(repair.cause):
        if repair.resync_generation is None or trainer.phase == "HELD":
            if repair.push_failed and not repair.resyncs_failed:
                return True  # it cannot load: a new process may
            if not _by_a_new_trainer(turn):
                give_up(turn, server, Reason.WEIGHTS_UNPROVEN)
            return False
        if not repair.called:
            server = replace(server, repair=replace(repair, called=True))
            turn.put(server)
            turn.note(
                "call",
                Reason.WEIGHTS_UNPROVEN,
                f"{server.name} waits for a RESYNC; the trainer, in {trainer.phase}, asks for no order",
            )
        _unheard(turn, server, since)
    elif again(turn, repair):
        prove(turn, server)
    return False


def _fails_slowly(turn: Turn, server: Server, repair: Repair) -> bool:
    """
    Whether the trainer may wait for this server's answers: it reaches no guard call, and they are worthless.

    Not while it stands at the gate or pushes: what it asks of the server then may be its own proof.
    """
    trainer, settings = turn.state.trainer, turn.state.settings
    if repair.resync_generation is None or trainer.phase in _NO_ROLLOUTS or server.running == 0:
        return False
    return repair.aborted_at is None or turn.now - repair.aborted_at >= ABORTS_APART * settings.interval_s


def _unheard(turn: Turn, server: Server, asked_at: float) -> None:
    """The wait for a trainer that reaches no guard call ends: it is started again, or a person decides."""
    waited_s = stall.deaf_s(turn.state, asked_at, turn.now)
    if waited_s is None or turn.state.relaunch is not None:
        return
    phase = turn.state.trainer.phase
    if turn.state.settings.trainer_managed and turn.state.phase is not Phase.SHADOW:
        text = f"the trainer, in {phase}, has reached no guard call for {waited_s / 60:.0f} min"
        relaunch.hung(turn, Reason.TRAINER_STALLED, f"{text}; {server.name} waits for its RESYNC")
    if turn.state.relaunch is None:
        give_up(turn, server, Reason.WEIGHTS_UNPROVEN)


def serve(turn: Turn, server: Server) -> None:
    """The repair is done."""
    repair = server.repair
    assert repair is not None
    if repair.changed and turn.state.trip is not None:
        turn.state = replace(turn.state, trip=replace(turn.state.trip, infra=True))
    server = replace(
        server,
        repair=None,
        stale_probes=0,
        stopped=(),
        tokens_at=turn.now,
        ready_doubted=server.endpoints.ready is Answer.UNAVAILABLE,
        failed_health=0,
        unanswered_since=None,
    )
    turn.put(server.move(ServerState.SERVING, turn.now, None))
    if repair.restarts:
        how = "weights proven current"
        if turn.state.relaunch is not None:
            how = "and gets its weights from the new trainer"
        elif _unguarded(turn, repair):
            how = "with the newest that was served" if repair.vouched else "with weights that nothing proves"
        turn.note("action", repair.cause, f"{server.name} serves again, {how}")
