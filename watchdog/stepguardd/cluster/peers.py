"""Pages of machines without the trainer: the head's order, and verdicts on the batches of a guard there."""

from dataclasses import replace

from ..core.state import Gate, GateOrder


class PeerPage:
    """
    What the page of such a machine says. The verdict stays on it while orders come and go.

    Args:
        judged_batch: what was on the page when it was adopted.

    """

    def __init__(self, judged_batch: int = 0) -> None:
        self._batch = judged_batch
        self._step: int | None = None
        self._refused: str | None = None

    def judge(self, batch: int, step: int, refused: str | None) -> None:
        """The verdict on a batch: why it is refused, or None."""
        self._batch, self._step, self._refused = batch, step, refused

    def of(self, gate: Gate) -> Gate:
        """The page under this order of the head's."""
        reason = gate.reason
        if gate.order is GateOrder.GO and self._refused is not None:
            reason = self._refused
        return replace(
            gate,
            reason=reason,
            judged_batch=self._batch,
            judged_step=self._step,
            judged_ok=self._refused is None,
        )
