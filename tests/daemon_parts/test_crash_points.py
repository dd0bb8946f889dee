"""
The daemon is killed at each named point of a real recovery, and the run ends recovered.

Every process is real: daemon, server tree and trainer. What is promised: exactly one server process started
for each intent, no optimizer step on garbage, and a trainer that goes on.
"""

from pathlib import Path

import pytest

from daemon_parts.small_run import SmallRun, small_run, training

pytestmark = pytest.mark.e2e

STOP_TO_CANARY = [
    "decided_StopServer",
    "before_StopServer",
    "stop_ended_tree",
    "after_StopServer",
    "decided_StartServer",
    "before_StartServer",
    "start_spawned",
    "after_StartServer",
    "decided_RunCanary",
    "before_RunCanary",
    "after_RunCanary",
]
PUSHED = ["gate_HOLD", *STOP_TO_CANARY, "decided_PushWeights", "before_PushWeights", "after_PushWeights"]
RESYNCED = ["after_RunCanary", "gate_RESYNC"]
ALONE = [
    "gate_HOLD",
    "before_StopServer",
    "stop_ended_tree",
    "after_StopServer",
    "decided_StartServer",
    "before_StartServer",
    "start_spawned",
    "after_StartServer",
    "after_RunCanary",
    "after_PushWeights",
]


def started_once(run: SmallRun) -> None:
    starts = run.starts()
    assert len(starts) == len(set(starts)), f"an intent was started twice: {starts}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("points", "push"), [(PUSHED, True), (RESYNCED, False)], ids=["push", "resync"])
def test_one_recovery_survives_a_kill_of_the_daemon_at_every_point(
    points: list[str], push: bool, tmp_path: Path, base_model: Path
) -> None:
    """One incident, and a daemon killed at each point of its repair, one after the other."""
    with small_run(tmp_path, base_model, push=push) as run:
        run.daemon()
        run.until(run.serving, "the first start")
        with training(run, resync=not push) as trainer:
            run.until(lambda: trainer.committed >= 3, "three steps")
            run.replace_daemon(points[0])
            run.kill_scheduler()
            run.crashed(points[0])
            for point in points[1:]:
                run.daemon(point)
                run.crashed(point)
            run.daemon("gate_GO")
            run.crashed("gate_GO")
            run.daemon()
            run.until(run.serving, "the server serves again")
            before = trainer.committed
            run.until(lambda: trainer.committed >= before + 5, "the trainer goes on")
            assert trainer.garbage == 0
        started_once(run)
        assert len(run.starts()) == 2
        status = run.status()
        assert status["servers"][0]["restarts"] == 1
        assert status["breaker"]["phase"] == "closed"


@pytest.mark.timeout(300)
def test_a_point_alone_is_survived_by_one_restart_of_the_daemon(tmp_path: Path, base_model: Path) -> None:
    """A recovery a point: killed there, started again without a point, and left to finish."""
    with small_run(tmp_path, base_model, push=True) as run:
        run.daemon()
        run.until(run.serving, "the first start")
        with training(run) as trainer:
            for number, point in enumerate(ALONE, 1):
                run.replace_daemon(point)
                run.kill_scheduler()
                run.crashed(point)
                run.daemon()
                run.until(run.serving, f"recovered after {point}")
                before = trainer.committed
                run.until(lambda before=before: trainer.committed >= before + 1, "the trainer goes on")
                assert len(run.starts()) == number + 1, (point, run.starts())
            assert trainer.garbage == 0
        started_once(run)
