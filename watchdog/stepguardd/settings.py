"""The figures of the config as the core wants them: plain values, so that the core knows no pydantic."""

from .config import Config
from .core.reward import RewardConfig
from .core.state import Mode, Settings


def core_settings(config: Config) -> Settings:
    """One frozen value with every figure that decisions depend on."""
    probe, recovery, guard = config.probe, config.recovery, config.guard
    return Settings(
        max_refused_batches=guard.max_refused_batches,
        max_staleness=guard.max_staleness,
        interval_s=probe.interval_s,
        deadlock_after_s=probe.deadlock_after_s,
        spin_after_s=probe.spin_after_s,
        kill_after_s=probe.kill_after_s,
        planned_lease_s=probe.planned_lease_s,
        restart_budget=recovery.restart_budget,
        restart_window_s=recovery.restart_window_s,
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
