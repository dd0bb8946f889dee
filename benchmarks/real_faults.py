"""
What a fault costs on a real SGLang: `python -m benchmarks.real_faults [FAULT ...]`; needs `make sglang`.

With Stepguard it is one run of `stepguard demo --server sglang`. Without, the same is done to a server that
is alone, with its crash diagnostics as they come: what becomes of a request that is sent right after, of
`/health`, and of the server. One run each, two to four minutes; `make bench` does two of them. The machine's
load is printed: it is most of what differs between two runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from stepguard_grpo.model import write_base_model
from stepguardd.demo.conduct import _free_port
from stepguardd.demo.faults import Fault, continue_generation, pause_generation, strike
from stepguardd.demo.servers import ServerKind, ServerMissingError, server_program
from stepguardd.demo.supervisor import Supervisor

CASES = ("kill", "detokenizer", "parent", "hang", "stale", "weights")
CASES += ("pause-abort", "pause-in_place", "pause-retract")
SOME = ("kill", "hang")
WATCHED_S = 90.0
PAUSED_S = 25.0


def main() -> None:
    """Measure and print."""
    wanted = sys.argv[1:] or CASES if sys.argv[0].endswith("real_faults.py") else SOME
    if unknown := set(wanted) - set(CASES):
        sys.exit(f"benchmarks: no {', '.join(sorted(unknown))}; there is {', '.join(CASES)}")
    try:
        server_program(ServerKind.SGLANG)
    except ServerMissingError as missing:
        print(f"not measured: {missing}")
        return
    for case in wanted:
        print(f"{case:15} load {os.getloadavg()[0]:.1f}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            print(f"  with Stepguard  {_with_stepguard(case, Path(folder))}", flush=True)
        with tempfile.TemporaryDirectory() as folder, _alone(case, Path(folder)) as (url, server):
            for line in _without(case, url, server, Path(folder)):
                print(f"  SGLang alone    {line}", flush=True)


def _with_stepguard(case: str, folder: Path) -> str:
    fault, _, mode = case.partition("-")
    command = [sys.executable, "-m", "stepguardd", "demo", "--server", "sglang", "--fault", fault, "--json"]
    command += ["--steps", "40", "--dir", str(folder / "demo"), *(["--pause-mode", mode] if mode else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"exit code {done.returncode}: {done.stderr.splitlines()[-1]}"
    found = json.loads(done.stdout)["guarded"]
    garbage = f"{found['garbage_steps']} garbage steps"
    if found["holds"] == 0:
        return f"no hold, {garbage}"
    return f"HOLD after {found['detect_s']:.2f} s, resumed {found['recover_s']:.1f} s later, {garbage}"


@contextlib.contextmanager
def _alone(case: str, folder: Path) -> Iterator[tuple[str, Supervisor]]:
    """A server that serves, and nobody beside it but what starts it again in the case `stale`."""
    write_base_model(folder / "base", seed=0)
    program, port = server_program(ServerKind.SGLANG), _free_port()
    command, log = program.command(folder / "base", port), folder / "server.log"
    server = Supervisor(command, log, restart=case == "stale", environment=program.environment)
    server.start()
    try:
        _until(lambda: "ready to roll" in log.read_text(errors="replace"), program.start_timeout_s)
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.stop()


def _without(case: str, url: str, server: Supervisor, folder: Path) -> Iterator[str]:
    fault, _, mode = case.partition("-")
    if fault == "weights":
        _load(url, folder / "base")
        yield f"a request: {_answer(url)}"
        return
    pid = server.pid
    assert pid is not None
    if fault == "pause":
        began = pause_generation(url, mode)
        watched_s = PAUSED_S
    else:
        struck = strike(Fault(fault), pid)
        assert struck is not None
        began, watched_s = struck, WATCHED_S
    said: dict[str, str] = {}
    looks = [
        threading.Thread(target=_request, args=(url, began, said), daemon=True),
        threading.Thread(target=_health, args=(url, began, watched_s, said), daemon=True),
    ]
    for look in looks:
        look.start()
    ended = _until(lambda: server.pid != pid, watched_s)
    at = time.monotonic() - began
    if fault == "pause":
        continue_generation(url)
    for look in looks:
        look.join(max(0.0, began + watched_s + 10.0 - time.monotonic()))
    yield f"a request: {said.get('request', f'still open after {watched_s:.0f} s')}"
    yield f"/health: {said.get('health', f'well for {watched_s:.0f} s')}"
    if not ended:
        yield f"the server lives on, {watched_s:.0f} s later"
    elif fault != "stale":
        yield f"the server has ended after {at:.1f} s; nobody starts it again"
    else:
        _until(lambda: _answer(url).startswith("200"), 240.0)
        yield f"ended after {at:.1f} s, serves again after {time.monotonic() - began:.1f} s: {_answer(url)}"


def _request(url: str, began: float, said: dict[str, str]) -> None:
    """What becomes of a request that is sent right after the fault."""
    answer = _answer(url, timeout_s=WATCHED_S)
    said["request"] = f"{answer} after {time.monotonic() - began:.1f} s"


def _health(url: str, began: float, watched_s: float, said: dict[str, str]) -> None:
    """When `/health` first says that something is wrong, or cannot say anything."""
    while time.monotonic() - began < watched_s:
        try:
            word = str(httpx.get(f"{url}/health", timeout=WATCHED_S, trust_env=False).status_code)
        except httpx.HTTPError as error:
            word = type(error).__name__
        if word != "200":
            said["health"] = f"{word} after {time.monotonic() - began:.1f} s"
            return


def _load(url: str, model: Path) -> None:
    body = {"model_path": str(model), "weight_version": "foreign"}
    httpx.post(f"{url}/update_weights_from_disk", json=body, timeout=60, trust_env=False).raise_for_status()


def _answer(url: str, timeout_s: float = 10.0) -> str:
    """The status of a small request, and the version of the weights that answered it."""
    body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, "ignore_eos": True}}
    try:
        reply = httpx.post(f"{url}/generate", json=body, timeout=timeout_s, trust_env=False)
    except httpx.HTTPError as error:
        return type(error).__name__
    version = reply.json()["meta_info"].get("weight_version") if reply.status_code == 200 else None
    return f"{reply.status_code}, weights {version!r}" if version is not None else str(reply.status_code)


def _until(what: Callable[[], bool], timeout_s: float) -> bool:
    """Wait for it, but not for ever; returns whether it came."""
    deadline = time.monotonic() + timeout_s
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


if __name__ == "__main__":
    main()
