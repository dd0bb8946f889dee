"""
What a recovery costs beyond the server's own start: `python -m benchmarks.recovery [KILLS]`.

A real daemon, the embedded server as its child, and a trainer with a guard that takes steps of no work. The
server's scheduler is SIGKILLed; the moments are taken from outside: the kill, HOLD on the gate page, the
command's first line, the first 200 of `/ready`, GO. The start is the server's own; the rest is overhead: the
hold, the end of the tree, `/ready` seen, canary generations, weights pushed, compared and believed. A probe
during a repair comes every 0.2 s, which is most of it.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.daemon import _ready, _start
from stepguard import Guard, StopRequested
from stepguard.gate import GatePage, Order
from stepguard_grpo.model import write_base_model
from stepguardd import proc
from stepguardd.control.client import ControlClient

KILLS = 5
GOAL_S = 1.0
VERSION = "7"
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """The moments of one, in seconds of the wall clock."""

    killed: float
    held: float
    started: float
    ready: float
    went_on: float

    @property
    def start_s(self) -> float:
        return self.ready - self.started

    @property
    def overhead_s(self) -> float:
        return self.went_on - self.killed - self.start_s


class Bench:
    """One run on this machine, in a folder that is gone afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        write_base_model(folder / "weights" / VERSION, seed=0)
        model = folder / "weights" / VERSION
        self.starts = folder / "starts"
        serve = f"{sys.executable} -m stepguard_grpo.server --model-path {model} --port {self.port}"
        command = ["bash", "-c", f'echo "$EPOCHREALTIME" >> {self.starts}; exec {serve}']
        self.config = folder / "config.toml"
        self.config.write_text(
            f'[run]\nname = "bench"\nmode = "act"\nrun_dir = "{folder}/run"\nstate_dir = "{folder}/state"\n'
            "[web]\nenabled = false\n"
            "[recovery]\nrestart_budget = 1000\nbackoff_first_s = 0.001\nbackoff_max_s = 0.001\n"
            f'[weights]\nsync = "disk"\npath = "{folder}/weights/{{version}}"\n'
            f'[server]\nurl = "http://127.0.0.1:{self.port}"\ncommand = {json.dumps(command)}\n'
        )

    def serving(self) -> bool:
        with ControlClient(self.folder / "run" / "control.sock") as client:
            status = client.status()
        calm = status["breaker"]["phase"] == "closed"
        return bool(calm and status["servers"][0]["state"] == "serving")

    def recover(self, page: GatePage) -> Recovery:
        (scheduler,) = [
            known
            for known in proc.marked("STEPGUARD_SERVER", f"bench@{self.folder}/state/server")
            if known.role == "scheduler"
        ]
        before = len(self.starts.read_text().split())
        killed = time.time()
        os.kill(scheduler.pid, signal.SIGKILL)
        held = _until(lambda: _order(page) is not Order.GO, 0.0002)
        _until(lambda: len(self.starts.read_text().split()) > before, 0.002)
        ready = _until(self._answers, 0.005)
        went_on = _until(lambda: _order(page) is Order.GO, 0.0005)
        started = float(self.starts.read_text().split()[-1])
        return Recovery(killed=killed, held=held, started=started, ready=ready, went_on=went_on)

    def _answers(self) -> bool:
        asked = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        with suppress(OSError, http.client.HTTPException):
            asked.request("GET", "/ready")
            return asked.getresponse().status == 200
        return False


def main(kills: int | None = None) -> None:
    """Kill, and print."""
    logging.getLogger("stepguard").setLevel(logging.CRITICAL)  # the trainer's word on each hold
    if kills is None:
        given = [argument for argument in sys.argv[1:] if argument.isdecimal()]
        kills = int(given[0]) if given else KILLS
    with tempfile.TemporaryDirectory(prefix="stepguard-bench-") as name:
        bench = Bench(Path(name))
        daemon = _start(["-m", "stepguardd", "run", "--config", str(bench.config)])
        over = threading.Event()
        trainer = threading.Thread(target=_train, args=(bench.folder / "run", over), daemon=True)
        try:
            _ready(bench.folder / "run", time.monotonic())
            trainer.start()
            page = GatePage.open(bench.folder / "run" / "gate", writable=False)
            found = []
            for number in range(1, kills + 1):
                _until(bench.serving, 0.1)
                found.append(bench.recover(page))
                print(f"  kill {number}: {found[-1].overhead_s:.2f} s", file=sys.stderr, flush=True)
            page.close()
        finally:
            over.set()
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(60)
            trainer.join(10)
    print(f"a recovery of the embedded server, {len(found)} kills, in seconds:")
    _told("kill to HOLD", [one.held - one.killed for one in found])
    _told("HOLD to the start", [one.started - one.held for one in found])
    _told("the server's own start", [one.start_s for one in found])
    _told("ready to GO", [one.went_on - one.ready for one in found])
    overheads = [one.overhead_s for one in found]
    _told("all but the start", overheads)
    met = "met" if statistics.median(overheads) <= GOAL_S else "not met"
    print(f"  goal: all but the start at most {GOAL_S:g} s, by the median: {met}")


def _train(run_dir: Path, over: threading.Event) -> None:
    """Steps of no work, at a pace; each asks for its verdict and waits at the gate."""
    guard = Guard(run_dir, heartbeat_s=0.2)
    try:
        guard.weights(VERSION)
        step = 0
        while not over.wait(0.05):
            step += 1
            rewards = [0.6 + 0.05 * ((step + member) % 5) for member in range(4)]
            batch = guard.admit(step, rewards, rewards=rewards, weight_versions=[VERSION] * 4)
            if batch.ok:
                guard.before_step(step)
                guard.after_step(step, reward=sum(rewards) / 4, weight_version=VERSION)
    except StopRequested:
        pass
    finally:
        guard.close()


def _order(page: GatePage) -> Order | None:
    half = page.daemon()
    return None if half is None else half.order


def _until(holds: Callable[[], bool], pause_s: float) -> float:
    """When it first held."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            sys.exit("benchmarks.recovery: not in time")
        time.sleep(pause_s)
    return time.time()


def _told(name: str, values: list[float]) -> None:
    print(f"  {name:<24} median {statistics.median(values):6.3f}   worst {max(values):6.3f}")


if __name__ == "__main__":
    main()
