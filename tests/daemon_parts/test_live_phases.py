"""Rows of the phase matrix in real time: a daemon, the embedded server as its child, and real requests."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from daemon_parts.small_run import SmallRun, small_run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

QUICK = {
    "interval_s": 0.2,
    "timeout_s": 2.0,
    "health_interval_s": 3.0,
    "health_timeout_s": 3.0,
    "deadlock_after_s": 2.0,
    "spin_after_s": 60.0,
    "kill_after_s": 120.0,
}
PASS_S = 8.0


@pytest.fixture
def run(base_model: Path, tmp_path: Path) -> Iterator[SmallRun]:
    with small_run(tmp_path / "r", base_model, push=False, probe=QUICK) as run:
        run.daemon()
        run.until(run.serving, "the server serves")
        yield run


@pytest.fixture
def http(run: SmallRun) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=run.url, timeout=60, trust_env=False) as client:
        yield client


def state(run: SmallRun) -> str:
    status = run.status()
    return str(status["servers"][0]["state"]) if status else ""


def answered(http: httpx.Client, path: str) -> int:
    """How often the server has answered this endpoint."""
    lines = http.get("/metrics").text.splitlines()
    return sum(
        int(float(line.rpartition(" ")[2]))
        for line in lines
        if line.startswith("sglang:http_responses_total{") and f'"{path}"' in line
    )


def test_a_live_server_is_asked_excused_held_for_and_never_restarted(
    run: SmallRun, http: httpx.Client
) -> None:
    # Idle: nothing shows that it generates, so it is asked for a token, and again.
    run.until(lambda: answered(http, "/health_generate") >= 2, "it is asked for tokens")

    # Paused: the scheduler is asked whether it still turns, and it does.
    for mode in ("abort", "in_place", "retract"):
        opinions = answered(http, "/server_info")
        http.post("/pause_generation", json={"mode": mode}).raise_for_status()
        run.until(lambda: state(run) == "planned", f"paused, mode {mode}, is silence on purpose")
        run.until(lambda asked=opinions: answered(http, "/server_info") > asked + 2, "its scheduler is asked")
        assert run.order() == "GO"
        http.post("/continue_generation", json={}).raise_for_status()
        run.until(lambda: state(run) == "serving", "it serves again")

    # Announced, and taken back.
    run.ask("plan-server", server="server", for_s=600)
    run.until(lambda: state(run) == "planned", "the announcement is believed")
    run.ask("plan-server", server="server", for_s=0)
    run.until(lambda: state(run) == "serving", "and taken back")
    assert run.status()["incidents"] == 0

    # A pass that takes for ever, with no processor busy: held for, and let go when it ends.
    http.post("/slow_down", json={"forward_sleep_time": PASS_S}).raise_for_status()
    body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
    with ThreadPoolExecutor(2) as pool:
        hanging = pool.submit(http.post, "/generate", json=body)
        run.until(lambda: run.order() == "HOLD", "the run is held")
        assert run.status()["incident"]["cause"] == "server_hung"
        quick_again = pool.submit(http.post, "/slow_down", json={"forward_sleep_time": None})
        run.until(run.serving, "it goes on when the pass has ended")
        assert hanging.result(timeout=60).status_code == quick_again.result(timeout=60).status_code == 200
    assert len(run.starts()) == 1
    assert not any(server["restarts"] for server in run.status()["servers"])
