"""A trainer that waits for the answers of a stale server is failed fast, and comes to re-sync it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from daemon_parts.small_run import PROMPT, MiniTrainer, SmallRun, small_run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

FORWARD_S = 1.0
TOKENS = 250


class Patient(MiniTrainer):
    """Sends each request again until it is answered, and waits for that answer for as long as it takes."""

    def __init__(self, run: SmallRun) -> None:
        super().__init__(run.run_dir, run.url, run.weights, resync=True)
        self.patient, self.slowed = threading.Event(), threading.Event()
        self.tokens = 2
        self.aborted = 0

    async def _rollout(self) -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=self._url, timeout=600, trust_env=False) as http:
            while not self.stopping.is_set():
                late, tokens = self.slowed.is_set(), self.tokens
                if tokens == TOKENS:
                    self.patient.set()
                with contextlib.suppress(httpx.HTTPError):
                    sampling = {"max_new_tokens": tokens, "ignore_eos": True}
                    body = {"input_ids": PROMPT, "sampling_params": sampling}
                    reply = (await http.post("/generate", json=body)).raise_for_status().json()
                    if reply["meta_info"]["finish_reason"]["type"] == "abort":
                        self.aborted += 1
                        raise RuntimeError("the rollout was aborted")
                    if tokens == 2 or late:
                        return {"version": reply["meta_info"]["weight_version"]}
                await asyncio.sleep(0.05)
        raise RuntimeError("the test is over")

    def _resynced(self, http: httpx.Client) -> None:
        self.tokens = 2
        http.post("/slow_down", json={"forward_sleep_time": None}).raise_for_status()
        super()._resynced(http)


def test_a_trainer_that_waits_for_a_stale_server_is_failed_fast(tmp_path: Path, base_model: Path) -> None:
    """Its requests would take four minutes; aborted, they end at once, and no garbage is trained on."""
    with small_run(tmp_path, base_model, push=False) as run:
        run.daemon()
        run.until(run.serving, "the first start")
        trainer = Patient(run)
        trainer.start()
        try:
            run.until(lambda: trainer.committed >= 2, "two steps")
            trainer.tokens = TOKENS
            run.until(trainer.patient.is_set, "a request that it waits for")
            run.kill_scheduler()
            run.until(lambda: run.order() == "RESYNC", "the new server is stale")
            with httpx.Client(base_url=run.url, timeout=60, trust_env=False) as http:
                http.post("/slow_down", json={"forward_sleep_time": FORWARD_S}).raise_for_status()
            trainer.slowed.set()
            run.until(lambda: trainer.resyncs, "the trainer comes to re-sync it", FORWARD_S * TOKENS / 2)
            assert trainer.aborted
            run.until(run.serving, "the server serves again")
            before = trainer.committed
            run.until(lambda: trainer.committed >= before + 2, "the trainer goes on")
            assert trainer.garbage == 0
        finally:
            trainer.stopping.set()
            trainer.slowed.set()
            trainer.join(timeout=20)
        assert trainer.failure is None
        assert not trainer.is_alive()
