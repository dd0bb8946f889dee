"""
Looks after the checkpoints of the ledger: each is vetted once, the last proven ones are kept from rotation.

It promises never to touch what the trainer wrote, and to be in nobody's way: it reads in a niced process and
copies in a thread, one checkpoint at a time. What it finds and does it tells as events; after a crash it
looks at the ledger again and does what is missing.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from ..checkpoints.layouts import Checkpoint, Folder, LayoutError, find_checkpoints, surroundings
from ..checkpoints.pinning import PinError, costs_space, free_bytes, pin, release
from ..checkpoints.vetting import Vetter, VettingLimits
from ..config import CheckpointSettings
from ..core.events import CheckpointGone, CheckpointPinned, CheckpointVetted, Event
from ..core.ledger import LedgerRow, newest_by_step, plan_pins
from ..core.state import Mode, State
from ..core.verdict import Depth, Finding, Verdict, Vetting
from ..failpoint import failpoint
from .rollback import folder_of, opened

log = logging.getLogger("stepguardd")

LOOK_INTERVAL_S: Final = 1.0
UNVETTED_TRIES: Final = 3
GIB: Final = 1 << 30


class Keeper:
    """
    One run's keeper.

    Args:
        settings: where checkpoints lie, how far to read them, how many to keep.
        state: the state as it is now.
        emit: where the events go.
        busy: held while the folder is changed; a rollback holds it too.

    """

    def __init__(
        self,
        settings: CheckpointSettings,
        state: Callable[[], State],
        emit: Callable[[Event], None],
        busy: asyncio.Lock,
    ) -> None:
        self._settings = settings
        self._state = state
        self._emit = emit
        self._busy = busy
        self._tries: dict[tuple[int, int], int] = {}
        self._ending = False
        rate = settings.vetting_mib_per_s
        self._limits = VettingLimits(
            depth=Depth(settings.vetting), bytes_per_s=None if rate is None else rate << 20
        )

    async def run(self) -> None:
        """Look at an interval. Ends by cancellation."""
        try:
            while True:
                more = await self.look()
                await asyncio.sleep(0.0 if more else LOOK_INTERVAL_S)
        finally:
            self._ending = True

    async def look(self) -> bool:
        """
        See to the pins, then vet the newest that was not vetted; whether there was one to vet.

        The pins come first: a trainer that saves faster than its checkpoints are read leaves no time after.
        """
        rows = [row for row in self._state().checkpoints if not row.set_aside]
        if not any(_wants(row) for row in rows):
            return False
        path = folder_of(self._settings, self._state().checkpoints)
        if path is None:
            return False
        try:
            folder = await asyncio.to_thread(opened, self._settings, path)
            found = await asyncio.to_thread(find_checkpoints, folder)
        except (LayoutError, OSError) as error:
            log.debug("checkpoints: %s", error)
            return False
        self._tell_gone(rows, found)
        if self._state().mode is not Mode.SHADOW:
            await self._pin(folder, found)
        for row in reversed(rows):
            if not row.vetted and not row.gone:
                return await self._vet(folder, found, row)
        return False

    def _tell_gone(self, rows: Sequence[LedgerRow], found: Sequence[Checkpoint]) -> None:
        live = {checkpoint.step for checkpoint in found if not checkpoint.pinned}
        for row in rows:
            if row.step not in live and not row.gone and (row.vetted or not Path(row.path).exists()):
                self._emit(CheckpointGone(attempt=row.attempt, step=row.step))

    async def _vet(self, folder: Folder, found: Sequence[Checkpoint], row: LedgerRow) -> bool:
        """One look at its files; False where it has to be looked at again a little later."""
        near = surroundings(folder, found)
        index = next((i for i, one in enumerate(found) if one.step == row.step), None)

        def read() -> Vetting:
            if index is None:
                # Reported before it stands under its name, or in a folder that is not the one configured.
                return Vetting(
                    verdict=Verdict.UNKNOWN,
                    finding=Finding.MISSING,
                    reason=f"not found in {folder.root}; check checkpoints.dir",
                    size_bytes=0,
                    depth=self._limits.depth,
                )
            with Vetter(self._limits) as vetter:
                return vetter.vet(folder, found[index], near[index], cancelled=lambda: self._ending)

        vetting = await asyncio.to_thread(read)
        unfinished = vetting.finding in {
            Finding.CHANGED,
            Finding.CANCELLED,
            Finding.MISSING,
            Finding.CUT_SHORT,
        }
        if unfinished and not self._tried(row):
            return False  # still being written, most likely
        self._tell_vetted(row, vetting)
        return True

    def _tried(self, row: LedgerRow) -> bool:
        """Count a try; whether it was the last."""
        key = (row.attempt, row.step)
        self._tries = {key: self._tries.get(key, 0) + 1}
        return self._tries[key] >= UNVETTED_TRIES

    def _tell_vetted(self, row: LedgerRow, vetting: Vetting) -> None:
        self._emit(
            CheckpointVetted(
                attempt=row.attempt,
                step=row.step,
                verdict=vetting.verdict.value,
                finding=vetting.finding.value,
                reason=vetting.reason,
                size_bytes=vetting.size_bytes,
            )
        )

    async def _pin(self, folder: Folder, found: Sequence[Checkpoint]) -> None:
        settings, state = self._settings, self._state()
        plan = plan_pins(
            list(newest_by_step(state.checkpoints).values()),
            keep=settings.keep_proven,
            healthy_steps=settings.proven_after_steps,
            copies=costs_space(folder),
            budget_bytes=int(settings.pinned_gib_max * GIB),
            free_bytes=await asyncio.to_thread(free_bytes, folder),
            slot=folder.layout.slot,
        )
        for row, why in plan.refused:
            if row.unpinned_because != why and not row.unpinned_because:
                self._emit(CheckpointPinned(attempt=row.attempt, step=row.step, trouble=why))
        at = {checkpoint.step: checkpoint for checkpoint in found if not checkpoint.pinned}
        for row in plan.pin:
            if row.step in at:
                await self._change(row, partial(_pinned, folder, at[row.step]))
        for row in plan.release:
            await self._change(row, partial(release, folder, row.step))

    async def _change(self, row: LedgerRow, act: Callable[[], str | None]) -> None:
        if self._busy.locked() or self._state().rollback or self._state().relaunch:
            return
        async with self._busy:
            try:
                path = await asyncio.to_thread(act)
            except (PinError, OSError) as error:
                if not row.unpinned_because:
                    self._emit(CheckpointPinned(attempt=row.attempt, step=row.step, trouble=str(error)))
                return
        failpoint("pinned")
        self._emit(CheckpointPinned(attempt=row.attempt, step=row.step, path=path))


def _pinned(folder: Folder, checkpoint: Checkpoint) -> str:
    return str(pin(folder, checkpoint))


def _wants(row: LedgerRow) -> bool:
    """Whether anything about a row may still change by a look at the disk."""
    return not row.vetted or not row.gone or row.pinned_path is not None
