"""AReaL keeps one checkpoint and rewrites it in place: a living daemon keeps what was good of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from checkpoints.runs_on_disk import areal, contents, dcp_folder
from daemon_parts.own_daemons import OwnDaemons
from stepguard import Guard, RollbackRequested
from stepguardd import proc
from stepguardd.checkpoints.layouts import PINNED

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


class SlotRun(OwnDaemons):
    """A run that saves as AReaL does."""

    def __init__(self, root: Path) -> None:
        self.slot, self._saves = root / "trial", root / "saves"
        checkpoints = {"dir": str(self.slot), "framework": "areal", "keep_proven": 1, "proven_after_steps": 2}
        super().__init__(root, {"checkpoints": checkpoints, "web": {"enabled": False}})
        self.step = 0

    def started(self) -> tuple[proc.Proc, ...]:
        return ()

    def save(self, guard: Guard, *, finite: bool = True) -> dict[str, bytes | str]:
        """Rewrite the slot's files; what is in them now."""
        fresh = self._saves / str(self.step)
        areal(fresh, self.step)
        if not finite:
            shutil.rmtree(fresh / "default")
            dcp_folder(fresh / "default/recover_checkpoint", self.step, finite=False)
        for part in ("default", "recover_info"):
            shutil.copytree(fresh / part, self.slot / part, dirs_exist_ok=True, copy_function=shutil.copy)
        guard.saved(self.step, self.slot / "default/recover_checkpoint")
        return self.in_slot()

    def in_slot(self) -> dict[str, bytes | str]:
        """What AReaL would resume from."""
        return {path: held for path, held in contents(self.slot).items() if not path.startswith(PINNED)}

    def take(self, guard: Guard, steps: int) -> None:
        for _ in range(steps):
            step = self.step + 1
            assert guard.admit(step, [1] * 4, rewards=[0.7, 1.0, 0.4, 0.7]).ok
            guard.before_step(step)
            guard.after_step(step, reward=0.7, metrics={"grad_norm": 0.4})
            self.step = step

    def kept(self) -> list[int]:
        """The steps of which there is a copy, and a proof."""
        rows = self.status().get("checkpoints", [])
        return [row["step"] for row in rows if row["pinned"] and row["proven"]]

    def row(self) -> dict[str, object]:
        rows = [row for row in self.status().get("checkpoints", []) if row["step"] == self.step]
        return rows[-1] if rows else {}


def test_a_slot_that_is_rewritten_can_be_gone_back_in(tmp_path: Path) -> None:
    """Each good save is copied before the next one; a rollback puts the proven one into the slot."""
    run = SlotRun(tmp_path)
    guard = None
    try:
        run.daemon()
        run.until(run.status, "the daemon answers")
        guard = Guard(run.run_dir, heartbeat_s=0.2)
        guard.on_rollback(lambda path, step: None)
        kept = {}
        for _ in range(2):
            run.take(guard, 3)
            kept[run.step] = run.save(guard)
            run.until(lambda: run.row().get("pinned"), f"the save of step {run.step} is copied")
        run.take(guard, 2)
        run.until(lambda: run.kept() == [6], "the older copy is let go, the newer one is proven")
        run.take(guard, 1)
        run.save(guard, finite=False)
        run.until(lambda: run.row().get("verdict") == "bad", "a save of NaN is found out")
        assert not run.row()["pinned"]

        run.ask("rollback", before_step=run.step)
        run.until(lambda: run.order() != "GO", "the run is held for it")
        with pytest.raises(RollbackRequested) as back:
            guard.before_step(run.step + 1)
        assert back.value.step == 6
        assert run.in_slot() == kept[6]
    finally:
        if guard is not None:
            guard.close()
        run.close()
