"""A live daemon writes an incident's report by itself, with what would be gone later in it."""

import json
import os
import signal
import stat
from pathlib import Path

import pytest

from daemon_parts.small_run import small_run, training
from stepguard_grpo.model import write_base_model
from stepguardd.incidents.decisions import redecide
from stepguardd.incidents.folders import folder_of

pytestmark = pytest.mark.e2e

STACKS = "#!/bin/sh\necho \"Thread $4 (idle): MainThread\"\necho '    forward (model.py:7)'\n"


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    write_base_model(path, seed=0)
    return path


def told(folder: Path) -> dict[str, object]:
    try:
        report = json.loads((folder / "report.json").read_text())
    except (OSError, ValueError):
        return {}
    assert isinstance(report, dict)
    return report


def test_an_incident_leaves_a_report_and_its_decisions(tmp_path: Path, base_model: Path) -> None:
    """A scheduler is killed; the report is there soon after probation, and the journal decides it again."""
    with small_run(tmp_path, base_model, push=True) as run:
        run.daemon()
        run.until(run.serving, "the first start")
        with training(run) as trainer:
            run.until(lambda: trainer.committed >= 5, "five steps")
            run.kill_scheduler()
            folder = folder_of(run.state_dir, 1)
            run.until(lambda: told(folder).get("stage") == "closed", "the report of the closed incident")
        report = told(folder)
        assert report["reason"] == "server_died"
        assert report["hypotheses"][0]["cause"] == "server_crash"  # type: ignore[index]
        assert report["cost"]["garbage_steps"] == trainer.garbage == 0  # type: ignore[index]
        assert redecide(folder / "decisions.jsonl").same
        page = (folder / "report.html").read_text()
        assert '<svg class="chart"' in page
        for name in ("metrics/server-before.txt", "metrics/server-after.txt", "logs/server.log"):
            assert (folder / name).stat().st_size > 0, name
        assert "sglang:" in (folder / "metrics" / "server-before.txt").read_text()


def test_a_hang_is_reported_with_stacks_and_while_it_is_open(
    tmp_path: Path, base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped scheduler that SIGCONT cannot help is dumped before it is killed, by whatever py-spy is."""
    tool = tmp_path / "bin" / "py-spy"
    tool.parent.mkdir()
    tool.write_text(STACKS)
    tool.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    with small_run(tmp_path / "r", base_model, push=True) as run:
        run.daemon()
        run.until(run.serving, "the first start")
        with training(run) as trainer:
            run.until(lambda: trainer.committed >= 3, "three steps")
            victim = next(known.pid for known in run.started() if known.role == "scheduler")
            os.kill(victim, signal.SIGSTOP)
            folder = folder_of(run.state_dir, 1)
            run.until(lambda: any((folder / "stacks").glob("*.txt")), "the stacks")
            run.until(lambda: told(folder).get("stage") == "closed", "the report")
        stacks = [path.read_text() for path in (folder / "stacks").glob("*.txt")]
        assert any(f"Thread {victim} (idle)" in text for text in stacks)
        report = told(folder)
        assert report["reason"] == "server_stopped"
        assert report["hypotheses"][0]["cause"] == "server_hang"  # type: ignore[index]
        assert "forward (model.py:7)" in (folder / "report.md").read_text()


def test_a_report_that_a_dead_daemon_owed_is_written_by_the_next(tmp_path: Path, base_model: Path) -> None:
    with small_run(tmp_path, base_model, push=True) as run:
        run.daemon()
        run.until(run.serving, "the first start")
        folder = folder_of(run.state_dir, 1)
        with training(run) as trainer:
            run.until(lambda: trainer.committed >= 3, "three steps")
            run.kill_scheduler()
            run.until(
                lambda: (run.status().get("last_incident") or {}).get("id") == 1, "the incident is over"
            )
            run.daemons[-1].kill()
            run.daemons[-1].wait(timeout=10)
            for path in sorted(folder.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            run.daemon()
            run.until(lambda: told(folder).get("stage") == "closed", "the report that was owed")
