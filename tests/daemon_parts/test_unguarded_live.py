"""A trainer without the guard: a daemon killed while its servers are paused, and weights served again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from daemon_parts.small_run import PROMPT, SmallRun

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

VERSION = "3"


class LoggedRun(SmallRun):
    """A run of whose trainer only a log is known; it once pushed a version."""

    def __init__(self, root: Path, model: Path) -> None:
        super().__init__(root, model, push=True)
        self.rows = root / "metrics.jsonl"
        self.rows.touch()
        with self.config.open("a") as config:
            config.write(f"[stream]\njsonl = {json.dumps(str(self.rows))}\n")

    def logged(self, steps: int) -> None:
        with self.rows.open("a") as rows:
            for step in range(steps):
                rows.write(json.dumps({"step": step, "reward": 0.7 + 0.01 * (step % 5)}) + "\n")

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    def push(self, http: httpx.Client) -> None:
        folder = self.weights / VERSION
        folder.symlink_to(self.weights / "model", target_is_directory=True)
        body = {"model_path": str(folder), "weight_version": VERSION}
        http.post("/update_weights_from_disk", json=body).raise_for_status()

    def told(self, reason: str) -> list[str]:
        with contextlib.closing(sqlite3.connect(f"file:{self.state_dir}/journal.db?mode=ro", uri=True)) as db:
            rows = db.execute("SELECT text FROM notices WHERE reason = ? ORDER BY id", (reason,)).fetchall()
        return [text for (text,) in rows]


@contextlib.contextmanager
def logged_run(root: Path, model: Path) -> Iterator[LoggedRun]:
    run = LoggedRun(root, model)
    try:
        yield run
    finally:
        run.close()


class Request(threading.Thread):
    """One request of the trainer's, open for as long as it takes."""

    def __init__(self, run: LoggedRun) -> None:
        super().__init__(daemon=True)
        self._run = run
        self.answer: dict[str, Any] = {}

    def run(self) -> None:
        with self._run.client() as http:
            body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
            self.answer = http.post("/generate", json=body).raise_for_status().json()


def test_a_pause_outlives_a_killed_daemon_and_ends_by_the_next(tmp_path: Path, base_model: Path) -> None:
    """Killed right after it, and again while it lasts; then the server dies, and has its weights again."""
    with logged_run(tmp_path, base_model) as run:
        run.logged(3)
        run.daemon()
        run.until(run.serving, "the first start")
        with run.client() as http:
            run.push(http)
            run.replace_daemon("after_PauseGeneration")
            run.until(lambda: run.status()["servers"][0]["weight_version"] == VERSION, "the version is seen")

            def paused() -> bool:
                return http.get("/ready").status_code == 503

            with contextlib.suppress(Exception):  # it dies with the answer on its lips
                run.ask("pause")
            run.crashed("after_PauseGeneration")
            assert paused(), "the fault: nobody is there to lift it"
            request = Request(run)
            request.start()

            second = run.daemon()
            run.until(lambda: run.order() == "HOLD" and run.status(), "the next daemon holds the run")
            os.kill(second.pid, signal.SIGKILL)
            second.wait(timeout=20)
            assert paused()
            assert not request.answer
            run.daemon()
            run.until(run.status, "a third daemon")
            assert paused(), "it goes on with the pause: a person holds the run"
            run.ask("resume")
            run.until(lambda: not paused(), "the pause ends with the hold")
            request.join(timeout=60)
            assert request.answer["meta_info"]["finish_reason"]["type"] == "length"
            run.until(run.serving, "the run goes on")

            run.kill_scheduler()
            run.until(lambda: len(run.starts()) == 2 and run.serving(), "the server is restarted")
            assert http.get("/model_info").json()["weight_version"] == VERSION
            assert run.told("weights_unproven") == []
            run.until(
                lambda: any("with the newest that was served" in text for text in run.told("server_died")),
                "people are told whose weights it has",
            )
