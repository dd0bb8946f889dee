"""
Obedience: the one place in the trainer that obeys orders.

Promise: every order other than GO is obeyed here, whichever guard call finds it; RESYNC, ROLLBACK and SAVE
are carried out once a generation, by the thread that made the call; what was carried out is acknowledged on
the page first, then in a report. Waiting is a generator that yields how long to wait, so that one logic
serves synchronous and asynchronous callers and a virtual clock.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Final, TypeVar, assert_never, cast

import stepguard
from stepguard.gate import SEQUENCE_WORD, DaemonHalf, Order
from stepguard.link import Link, OnceLog
from stepguard.orders import Act, CarryOut, Go, Hold, RollbackRequested, Stop, StopRequested, next_act
from stepguard.presence import Presence
from stepguard.ranks import Ranks
from stepguard.reports import Ack
from stepguard.settings import GuardSettings

T = TypeVar("T")
Waits = Generator[float, None, T]
"""Yields seconds to wait; returns a T."""

REPEAT_S: Final = 1.0
"""How often a report that waits for its answer is sent again."""

SHARED_POLL_S: Final = 1.0
"""How often held ranks ask rank 0 again."""

_POLL_FIRST_S: Final = 0.02
_POLL_LAST_S: Final = 0.1


class Obedience:
    """
    Looks at the page, decides by `next_act`, and does it.

    Args:
        run_dir: where `guard.json` is; None without a daemon.
        link: the page and the socket.
        presence: what this trainer shows.
        ranks: this process among its peers.
        settings: in place of `guard.json`.
        clock_ns: CLOCK_MONOTONIC.
        logger: for what happens.
        log: for what is said once.
        on_rollback: told when the weights go back in time, before the handler runs.

    Attributes:
        words: the page's words, for the hot path in `before_step`.
        go_sequence: as long as the page's sequence word equals this, and
        go_until_ns: the clock is before this, the answer is GO.
        seen: the newest valid daemon half.
        stopped: whether StopRequested was raised.
        settings: the guard's.

    """

    def __init__(
        self,
        run_dir: Path | None,
        *,
        link: Link,
        presence: Presence,
        ranks: Ranks,
        settings: GuardSettings | None,
        clock_ns: Callable[[], int],
        logger: logging.Logger,
        log: OnceLog,
        on_rollback: Callable[[], None],
    ) -> None:
        self._run_dir = run_dir
        self._link = link
        self._presence = presence
        self._ranks = ranks
        self._given_settings = settings
        self._clock_ns = clock_ns
        self._logger = logger
        self._log = log
        self._on_rollback = on_rollback

        self._handlers: dict[str, Callable[..., object]] = {}
        self._hello_said = False
        self._had_page = False
        self._held_since_ns: int | None = None
        self._self_held_generation: int | None = None
        self._self_held_for = ""
        self._last_ack: Ack | None = None
        self._looking = threading.RLock()
        self._carrying_out = threading.RLock()
        self._handler_thread: int | None = None

        self.refusals = 0
        self.stopped = False
        self.seen: DaemonHalf | None = None
        self.settings = self._read_settings()
        self.words = link.words
        self.go_sequence = -1
        self.go_until_ns = 0
        self.refresh()

    def handle(self, name: str, handler: Callable[..., object]) -> None:
        """Register the handler for "resync", "rollback" or "save"."""
        self._handlers[name] = handler
        self._presence.handles = frozenset(self._handlers)
        self._hello_said = False
        self._presence.show()

    def orders(self, *, collective: bool = False) -> Waits[None]:
        """
        Carry out what the daemon wants; returns on GO.

        Args:
            collective: every rank is in this call. Where ranks decide together, other calls do not obey.

        Raises:
            StopRequested: ordered, or held too long with nobody to lift it.
            RollbackRequested: ordered.

        """
        if self._handler_thread == threading.get_ident() or (self._ranks.together and not collective):
            return
        self.say_hello()
        pause_s = _POLL_FIRST_S
        repeat_ns = self._clock_ns() + int(REPEAT_S * 1e9)
        held = False
        try:
            while True:
                act: Act = self._ranks.share(self.next_act())
                match act:
                    case Go():
                        self._acknowledge(Order.GO, act.generation)
                        if held:
                            self._released(act)
                        return
                    case Hold():
                        if not held:
                            held = True
                            self._held(act)
                        if act.ordered:
                            self._acknowledge(Order.HOLD, act.generation)
                        yield SHARED_POLL_S if self._ranks.together else pause_s
                        pause_s = min(pause_s * 1.25, _POLL_LAST_S)
                        if self._clock_ns() >= repeat_ns:
                            repeat_ns = self._clock_ns() + int(REPEAT_S * 1e9)
                            self._repeat_ack(act)
                    case CarryOut():
                        self._carry_out(act)
                    case Stop():
                        self.stopped = True
                        if act.ordered:
                            self._acknowledge(Order.STOP, act.generation)
                        raise StopRequested(act.reason)
                    case _:
                        assert_never(act)
        finally:
            if held:
                self._presence.wait_over()
                if not self._presence.waiting:
                    self._held_since_ns = None

    def next_act(self) -> Act:
        """Look at the page, and for another page where the one in hand has no living daemon."""
        if not self._ranks.first:
            return Go(until_ns=0, generation=0, lost=True)  # a place holder: rank 0's is what counts
        with self._looking:
            sequence, half = self.words[SEQUENCE_WORD], self._link.daemon()
            if (half is None or self._clock_ns() >= half.lease_deadline_ns) and self.refresh():
                sequence, half = self.words[SEQUENCE_WORD], self._link.daemon()
            now_ns = self._clock_ns()
            if half is not None:
                self._take_note(half, now_ns)
            act = next_act(
                self.seen,
                now_ns=now_ns,
                acked_generation=self._presence.acked_generation,
                held_since_ns=self._held_since_ns,
                self_held=None if self._self_held_generation is None else self._self_held_for,
                settings=self.settings,
            )
            # A page that does not check out is asked again each time: the next order may be under way.
            readable = half is not None or not self._link.has_page
            if isinstance(act, Go) and readable and not self._ranks.together:
                self.go_until_ns = act.until_ns
                self.go_sequence = sequence
            else:
                self.go_sequence = -1
        self._say_lost(act)
        return act

    def hold_by_itself(self, reason: str) -> None:
        """Hold from now on, until a living daemon says GO under a new generation."""
        self._self_held_for = reason
        if self._self_held_generation is None:
            self._self_held_generation = -1 if self.seen is None else self.seen.generation
            self.go_sequence = -1

    def daemon_lives(self) -> bool:
        """Whether a living daemon is behind the page."""
        self.next_act()
        return self.seen is not None and self._clock_ns() < self.seen.lease_deadline_ns

    def refresh(self) -> bool:
        """Map the page if need be and say on it what this trainer is; True when there is a new one."""
        with self._looking:
            if not self._link.refresh():
                return False
            self.go_sequence = -1
            self.words = self._link.words
            self.settings = self._read_settings()
            before = None if self._had_page else self._link.trainer()
            self._had_page = True
            if before is not None:
                self._presence.attempt = before.attempt + 1
                self._presence.acked_generation = before.acked_generation
            self._hello_said = False
            self._presence.show()
            return True

    def say_hello(self) -> None:
        """Tell the daemon who this is, until that went out."""
        if self._hello_said or self._run_dir is None:
            return
        self._hello_said = self._link.send(
            {
                "v": 1,
                "kind": "hello",
                "attempt": self._presence.attempt,
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "version": stepguard.__version__,
                "handles": [name for name in ("resync", "rollback", "save") if name in self._handlers],
            }
        )

    def close(self) -> None:
        """Let go of the page; from now on there is no daemon and no order."""
        with self._looking:
            self._link.close()
            self._run_dir = None
            self.seen = None
            self._self_held_generation = None
            self.go_sequence = -1
            self.words = self._link.words

    def _take_note(self, half: DaemonHalf, now_ns: int) -> None:
        self.seen = half
        if half.generation < self._presence.acked_generation:  # a daemon that lost its count began anew
            self._presence.acked_generation = max(0, half.generation - 1)
        if self._self_held_generation not in (None, half.generation) and now_ns < half.lease_deadline_ns:
            self._self_held_generation = None

    def _say_lost(self, act: Act) -> None:
        """Say when the daemon is gone, and when it is back."""
        if self.seen is None or isinstance(act, CarryOut | Stop):
            return
        if act.lost:
            does = "training goes on" if isinstance(act, Go) else "holding"
            self._log.once("lost", "the daemon's lease ran out on %s: %s", self.seen.order.name, does)
        else:
            self._log.over("lost", "the daemon is back")

    def _held(self, act: Hold) -> None:
        """A hold begins for this caller."""
        if self._held_since_ns is None:
            self._held_since_ns = self._clock_ns()
            where = "" if self._presence.step is None else f" at step {self._presence.step}"
            self._logger.warning("holding%s: %s", where, act.reason or "no reason given")
        self._presence.wait()

    def _released(self, act: Go) -> None:
        """The hold that this caller waited in is over."""
        self.refusals = 0
        if self._held_since_ns is not None:
            held_s = (self._clock_ns() - self._held_since_ns) / 1e9
            self._held_since_ns = None
            self._logger.warning("going on after %.1f s on hold (generation %d)", held_s, act.generation)

    def _carry_out(self, act: CarryOut) -> None:
        """RESYNC, ROLLBACK or SAVE, once a generation; ROLLBACK ends in its exception."""
        with self._carrying_out:
            if self._ranks.first and act.generation <= self._presence.acked_generation:
                return  # another thread was quicker
            self._logger.warning("%s ordered (generation %d): %s", act.order.name, act.generation, act.reason)
            self._handler_thread = threading.get_ident()
            self._presence.wait()
            try:
                results = self._ranks.gathered(self._handled(act))
            finally:
                self._handler_thread = None
                self._presence.wait_over()
            failures = [
                f"rank {rank}: {why}" if rank else why for rank, (ok, why) in enumerate(results) if not ok
            ]
            detail = failures[0] if failures else results[0][1]
            if act.order is Order.ROLLBACK:
                self._presence.attempt += 1
                self.refusals = 0
            self._acknowledge(act.order, act.generation, ok=not failures, detail=detail)
            if act.order is Order.ROLLBACK:
                reloaded = not failures and "rollback" in self._handlers
                raise RollbackRequested(act.target_step, act.target_path, reloaded)

    def _handled(self, act: CarryOut) -> tuple[bool, str]:
        """Call the handler; whether it did its work, and if not, why not."""
        handler = self._handlers.get(act.order.name.lower())
        arguments: tuple[Any, ...] = ()
        if act.order is Order.ROLLBACK:
            self._on_rollback()
            if handler is None:
                return True, "no handler: raised to the trainer"
            arguments = (act.target_path, act.target_step)
        if handler is None:
            return False, f"no handler for {act.order.name}"
        try:
            handler(*arguments)
        except Exception as error:  # the border of the handler: its failure is the answer
            self._logger.exception("the handler for %s failed", act.order.name)
            return False, f"{type(error).__name__}: {error}"[:500]
        return True, ""

    def _acknowledge(self, order: Order, generation: int, *, ok: bool = True, detail: str = "") -> None:
        """Say on the page and in a report that an order was carried out; each generation once."""
        if not self._ranks.first or generation <= self._presence.acked_generation:
            return
        self._presence.acked_generation = generation
        self._presence.show()
        self._last_ack = cast(
            "Ack",
            {
                "v": 1,
                "kind": "ack",
                "attempt": self._presence.attempt,
                "generation": generation,
                "order": order.name,
                "ok": ok,
                "detail": detail,
            },
        )
        self._link.send(self._last_ack)

    def _repeat_ack(self, act: Hold) -> None:
        """Still waiting on an order that was carried out: perhaps its acknowledgement was lost."""
        ack = self._last_ack
        if ack is not None and ack["generation"] == act.generation and ack["order"] != "HOLD":
            self._link.send(ack)

    def _read_settings(self) -> GuardSettings:
        if self._given_settings is not None:
            return self._given_settings
        if self._run_dir is None:
            return GuardSettings()
        settings, complaints = GuardSettings.read(self._run_dir)
        for complaint in complaints:
            self._log.once(complaint, "%s", complaint)
        return settings
