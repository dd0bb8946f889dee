"""
What an order means at this instant: one pure function, `next_act`, and the two exceptions that leave the
guard.

Promise: no clock, no page, no waiting in here. A hold is lifted by a living daemon's GO alone; a daemon
that died never lifts one and never ends a run that it had let go, unless the settings say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from stepguard.gate import DaemonHalf, Order
from stepguard.settings import GuardSettings

_LOOK_AGAIN_NS: Final = 1_000_000_000


class StopRequested(Exception):  # noqa: N818 - an order that arrived, not an error
    """
    The run is to end here, in an orderly way.

    Args:
        reason: why, for people.

    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RollbackRequested(Exception):  # noqa: N818 - an order that arrived, not an error
    """
    The batch in hand is void; go on from an older checkpoint.

    Args:
        step: the checkpoint's step, None where the daemon named none.
        path: the checkpoint, None where the daemon named none.
        reloaded: the handler given to `on_rollback` has already loaded it.

    """

    def __init__(self, step: int | None, path: str | None, reloaded: bool = False) -> None:
        super().__init__(step, path, reloaded)
        self.step = step
        self.path = path
        self.reloaded = reloaded

    def __str__(self) -> str:
        done = "reloaded" if self.reloaded else "not yet reloaded"
        return f"roll back to step {self.step} ({self.path}), {done}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Go:
    """Go on; look again at `until_ns`. `lost`: no living daemon vouches for it."""

    until_ns: int
    generation: int
    lost: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Wait. `lost`: no living daemon vouches for it; `ordered`: by HOLD, not by the guard itself."""

    reason: str
    generation: int
    lost: bool
    ordered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CarryOut:
    """RESYNC, ROLLBACK or SAVE, not yet acknowledged."""

    order: Order
    generation: int
    reason: str
    target_step: int | None
    target_path: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """End the run. `ordered`: by the order STOP, not by the guard itself."""

    reason: str
    generation: int
    ordered: bool


Act = Go | Hold | CarryOut | Stop


def next_act(
    seen: DaemonHalf | None,
    *,
    now_ns: int,
    acked_generation: int,
    held_since_ns: int | None,
    self_held: str | None,
    settings: GuardSettings,
) -> Act:
    """
    What to do now.

    Args:
        seen: the newest valid daemon half, None if there never was one.
        now_ns: CLOCK_MONOTONIC.
        acked_generation: the newest order acknowledged.
        held_since_ns: when the present hold began, None if there is none.
        self_held: why the guard holds by itself, where no living daemon has said anything new since.
        settings: what the guard goes by.

    """
    generation = 0 if seen is None else seen.generation
    alive = seen is not None and now_ns < seen.lease_deadline_ns
    if seen is not None:
        match seen.order:
            case Order.STOP:
                return Stop(reason=_stop_reason(seen, now_ns), generation=generation, ordered=True)
            case Order.RESYNC | Order.ROLLBACK | Order.SAVE if generation > acked_generation:
                return CarryOut(
                    order=seen.order,
                    generation=generation,
                    reason=seen.reason,
                    target_step=seen.target_step,
                    target_path=seen.target_path,
                )
            case _:
                pass
    let_go = seen is None or seen.order is Order.GO
    if let_go and not self_held and (alive or settings.on_daemon_lost == "continue"):
        until_ns = seen.lease_deadline_ns if seen is not None and alive else now_ns + _LOOK_AGAIN_NS
        return Go(until_ns=until_ns, generation=generation, lost=not alive)
    reason = self_held or ("daemon_lost" if seen is None or let_go else seen.reason)
    if held_since_ns is not None and (self_held or not alive):
        lease_end_ns = 0 if seen is None or self_held else seen.lease_deadline_ns
        if now_ns - max(held_since_ns, lease_end_ns) >= settings.orphan_hold_s * 1e9:
            why = f"held for {settings.orphan_hold_s:g} s ({reason or 'no reason given'}), lifted by nobody"
            return Stop(reason=why, generation=generation, ordered=False)
    ordered = seen is not None and seen.order is Order.HOLD
    return Hold(reason=reason, generation=generation, lost=not alive, ordered=ordered)


def _stop_reason(seen: DaemonHalf, now_ns: int) -> str:
    """The daemon's reason; and, where the daemon is gone, what keeps the order standing."""
    age_s = (now_ns - seen.lease_deadline_ns) / 1e9
    if age_s < 0:
        return seen.reason
    return (
        f"{seen.reason} (by a daemon gone for {age_s:.0f} s: to run again start it, or remove the gate page)"
    )
