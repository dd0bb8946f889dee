"""The figures of the config as the core wants them: plain values, so that the core knows no pydantic."""

from dataclasses import replace

from .config import Config, ServerSettings
from .core.memory import Climb, Ladder, Limits
from .core.reward import RewardConfig
from .core.state import Hands, Mode, Server, Settings
from .effects.backends.contract import value_of
from .effects.model_sizes import sizes


def core_settings(config: Config) -> Settings:
    """One frozen value with every figure that decisions depend on."""
    probe, recovery, guard = config.probe, config.recovery, config.guard
    return Settings(
        max_refused_batches=guard.max_refused_batches,
        max_staleness=guard.max_staleness,
        interval_s=probe.interval_s,
        deadlock_after_s=probe.deadlock_after_s,
        spin_after_s=probe.spin_after_s,
        health_interval_s=probe.health_interval_s,
        health_timeout_s=probe.health_timeout_s,
        colocated=probe.colocated or any(server.backend == "trainer" for server in config.servers),
        kill_after_s=probe.kill_after_s,
        planned_lease_s=probe.planned_lease_s,
        restart_budget=recovery.restart_budget,
        restart_window_s=recovery.restart_window_s,
        ladder=Ladder(
            mem_fractions=config.memory.mem_fractions,
            running=config.memory.running_requests,
            min_kv_tokens=config.memory.min_kv_tokens,
            quiet_s=config.memory.step_up_after_s,
        ),
        backoff_first_s=recovery.backoff_first_s,
        backoff_max_s=recovery.backoff_max_s,
        backoff_jitter=recovery.backoff_jitter,
        healthy_reset_s=recovery.healthy_reset_s,
        canary_timeout_s=recovery.canary_timeout_s,
        probation_steps=recovery.probation_steps,
        poison_steps=recovery.poison_steps,
        quorum=recovery.quorum,
        cont_grace_s=recovery.cont_grace_s,
        locked_out_hold_s=recovery.locked_out_hold_s,
        gpu_free_timeout_s=recovery.gpu_free_timeout_s,
        resync_timeout_s=recovery.resync_timeout_s,
        save_timeout_s=recovery.save_timeout_s,
        start_timeout_s=max((server.start_timeout_s for server in config.servers), default=600.0),
        stop_timeout_s=max((server.stop_timeout_s for server in config.servers), default=20.0),
        proven_after_steps=config.checkpoints.proven_after_steps,
        on_policy_collapse=recovery.on_policy_collapse,
        trainer_managed=config.trainer.backend != "none",
        trainer_start_timeout_s=config.trainer.start_timeout_s,
        trainer_stop_timeout_s=config.trainer.stop_timeout_s,
        relaunch_budget=config.trainer.relaunch_budget,
        relaunch_window_s=config.trainer.relaunch_window_s,
        relaunches_without_step=config.trainer.relaunches_without_step,
        lost_rank_grace_s=config.trainer.lost_rank_grace_s,
        request_timeout_s=config.trainer.request_timeout_s,
        stall_factor=config.trainer.stall_factor,
        stall_floor_s=config.trainer.stall_floor_s,
        stall_ceiling_s=config.trainer.stall_ceiling_s,
        weights_fixed=config.weights.sync == "none",
        mode=Mode(config.run.mode),
        push_weights=config.weights.sync == "disk" and config.weights.path is not None,
        reward=RewardConfig(
            rollouts_per_step=config.reward.rollouts_per_step,
            false_alarm_steps=config.reward.false_alarm_steps,
            warning_alarm_steps=config.reward.warning_alarm_steps,
            zero_streak_warn=config.reward.zero_streak_warn,
            zero_streak_hold=config.reward.zero_streak_hold,
            min_reward=config.reward.min_reward,
            no_step_for_s=config.reward.no_step_for_s,
        ),
    )


_HANDS = {"trainer": Hands.TRAINER, "ray": Hands.OTHERS, "http": Hands.OTHERS}


def core_server(config: Config, one: ServerSettings, *, now: float) -> Server:
    """A server of the config of which nothing is known yet."""
    command = one.command
    own = Limits(
        mem_fraction=_number(value_of(command, "--mem-fraction-static")),
        running=_whole(value_of(command, "--max-running-requests")),
        prefill_tokens=_whole(value_of(command, "--chunked-prefill-size")),
        total_tokens=_whole(value_of(command, "--max-total-tokens")),
    )
    return Server(
        name=one.name,
        managed=one.backend != "none",
        hands=_HANDS.get(one.backend, Hands.OWN),
        node=one.node,
        climb=Climb(own=own, limits=own),
        sizes=sizes(command, cwd=one.cwd, gpu_gib=config.memory.gpu_gib),
        since=now,
    )


def refitted(known: Server, fresh: Server) -> Server:
    """What is known of a server, under the config of today; other arguments begin another climb."""
    climb = known.climb if known.climb.own == fresh.climb.own else fresh.climb
    return replace(
        known, managed=fresh.managed, hands=fresh.hands, node=fresh.node, sizes=fresh.sizes, climb=climb
    )


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
