"""The batch script of the documentation, run as Slurm runs it, with the real daemon and a server."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon_parts.small_run import small_run
from stepguard_grpo.model import write_base_model
from stepguardd import proc

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

SCRIPT = Path(__file__).parents[2] / "docs/deploy/examples/train.sbatch"
# This machine has no eight GPUs to wait for; everything else is the real command.
STEPGUARD = f"""#!/bin/sh
[ "$1" = wait ] && exit 0
exec {sys.executable} -m stepguardd "$@"
"""
TRAINER = """
import os, pathlib, signal, sys, time
heard = pathlib.Path("heard").open("a", buffering=1)
signal.signal(signal.SIGUSR1, lambda *_: heard.write("saving\\n"))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
heard.write(os.environ["STEPGUARD_RUN_DIR"] + "\\n")
while True:
    time.sleep(0.05)
"""


def servers(job: str) -> tuple[proc.Proc, ...]:
    """The processes of the job's server, as the daemon finds them again."""
    return proc.marked("STEPGUARD_SERVER", f"job-{job}@/tmp/stepguard-{job}/server")


def test_a_batch_job_saves_on_slurms_warning_and_ends_with_the_trainers_code(tmp_path: Path) -> None:
    """USR1 reaches the trainer and ends nothing; TERM ends it, its code is the job's, and nothing is left."""
    job = f"test-{os.getpid()}"
    heard, log = tmp_path / "heard", tmp_path / "job.log"
    for name, text in (("stepguard", STEPGUARD), ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "train.py").write_text(TRAINER)
    write_base_model(tmp_path / "base", seed=0)
    with small_run(tmp_path / "run", tmp_path / "base", push=False) as run:
        (tmp_path / "run.toml").write_text(run.config.read_text())
        environment = os.environ | {
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": job,
        }
        with log.open("wb") as out:
            child = subprocess.Popen(["bash", SCRIPT], cwd=tmp_path, env=environment, stdout=out, stderr=out)

        def until(what: Callable[[], object], words: str) -> None:
            deadline = time.monotonic() + 120
            while not what():
                assert child.poll() is None, log.read_text()
                assert time.monotonic() < deadline, f"not in time: {words}\n{log.read_text()}"
                time.sleep(0.05)

        try:
            until(heard.exists, "the trainer begins, so the server generates")
            assert heard.read_text().split() == [f"/dev/shm/stepguard-{job}"]
            assert servers(job)
            child.send_signal(signal.SIGUSR1)
            until(lambda: "saving" in heard.read_text(), "the warning reaches the trainer")
            child.send_signal(signal.SIGTERM)
            assert child.wait(timeout=60) == 7, log.read_text()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait(timeout=60)
        assert "watching run job-" in (tmp_path / f"stepguard-{job}.log").read_text()
        assert servers(job) == ()
    assert not Path(f"/dev/shm/stepguard-{job}").exists()
    assert not Path(f"/tmp/stepguard-{job}").exists()
