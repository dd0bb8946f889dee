"""
The gate page, the daemon's half: the one effect that does not wait for the journal.

It is idempotent, and a hold must not wait for a disk. The lease is renewed by the decision loop itself, so a
daemon that has stopped deciding stops vouching within seconds.
"""

from pathlib import Path
from typing import Final

from stepguard.gate import DaemonHalf, GatePage, Order

from .. import clock
from ..core.state import Gate

LEASE_S: Final = 5.0


class GateWriter:
    """
    The daemon's half of a run's page.

    Args:
        path: `<run_dir>/gate`; made when absent, adopted with its orders when it is there.

    Raises:
        GateError: it cannot be made or mapped there; the message names the remedy.

    """

    def __init__(self, path: Path) -> None:
        self.page = GatePage.create(path)

    def found(self) -> DaemonHalf | None:
        """What an earlier daemon left on the page."""
        return self.page.daemon()

    def publish(self, gate: Gate, until_ns: int | None = None) -> None:
        """Put an order and a verdict on the page, in one write; vouched for until then, or for a lease."""
        self.page.publish(
            DaemonHalf(
                order=Order[gate.order.value],
                generation=gate.generation,
                reason=gate.reason,
                lease_deadline_ns=_deadline_ns() if until_ns is None else until_ns,
                target_step=gate.target_step,
                target_path=gate.target_path,
                judged_batch=gate.judged_batch,
                judged_step=gate.judged_step,
                judged_ok=gate.judged_ok,
            )
        )

    def renew(self, until_ns: int | None = None) -> None:
        """Vouch for the page until then, or for another lease."""
        self.page.renew_lease(_deadline_ns() if until_ns is None else until_ns)

    def close(self, *, vouch: bool = False) -> None:
        """Let go of the page; the lease ends now, so that the trainer learns at once that nobody is there."""
        if not vouch and self.page.daemon() is not None:
            self.page.renew_lease(clock.monotonic_ns())
        self.page.close()


def _deadline_ns() -> int:
    return clock.monotonic_ns() + int(LEASE_S * 1e9)
