"""
The page at its largest, and what it costs: `python -m benchmarks.page [SECONDS]`.

A run with 1,000 servers and 100,000 steps stands behind the real API, the real doors and a real TCP port,
and Chromium opens it: when is it there, when is the curve drawn, how long is the longest stretch in which it
would not answer a click. Then a real daemon with one server, without and with its page open.

`python -m benchmarks.page serve` only serves the large run, for somebody who wants to look at it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.daemon import SERVER, _cpu_s, _ready, _start
from stepguardd import status
from stepguardd.chronicle.chronicle import Chronicle, Episode, Notice
from stepguardd.chronicle.curve import Point
from stepguardd.config.settings import WebSettings
from stepguardd.control.api import create_app
from stepguardd.core.breaker import Phase
from stepguardd.core.reasons import Reason
from stepguardd.core.reward import RewardState
from stepguardd.core.state import (
    Gate,
    GateOrder,
    Incident,
    Mode,
    Server,
    ServerState,
    Settings,
    State,
    Trainer,
)
from stepguardd.web.live import Live
from stepguardd.web.reading import CheckpointDict
from stepguardd.web.server import PageServer

SECONDS = 20.0
OPENINGS = 7
GOAL_INTERACTIVE_S, GOAL_CORE = 1.0, 2.0
SERVERS, STEPS = 1_000, 100_000
FELL_AT, AGAIN_AT = 41_880, 99_400
DIPS = (63_001, 80_500)  # one bad step of 100,000: it must still be seen
STATES = [
    (ServerState.DEAD, 8, Reason.SERVER_DIED),
    (ServerState.STALE, 3, Reason.WEIGHTS_UNPROVEN),
    (ServerState.SUSPECT, 5, Reason.SERVER_HUNG),
    (ServerState.STARTING, 6, None),
    (ServerState.RESTARTING, 4, Reason.SERVER_DIED),
    (ServerState.PLANNED, 12, Reason.SERVER_PAUSED),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
# In the page, before its own script: when it said something, when the curve stood, how long it was deaf.
WATCH = """
window.seen = {};
const mark = (name) => { window.seen[name] ??= performance.now(); };
const look = () => {
  const word = document.getElementById("word");
  if (word && word.textContent !== "Connecting" && document.documentElement.dataset.ready) mark("state");
  if (document.querySelector("#servers .heat, #servers .rows")) mark("tiles");
  if (document.querySelector("#plot .scatterlayer .trace")) mark("curve");
};
const all = { subtree: true, childList: true, characterData: true, attributes: true };
new MutationObserver(look).observe(document, all);
window.deaf = [];
new PerformanceObserver((list) => window.deaf.push(...list.getEntries().map((one) => one.duration)))
  .observe({ type: "longtask", buffered: true });
"""


class LargeRun:
    """A run of a size that few have, as the API sees a daemon. Its step goes on; nothing is decided here."""

    def __init__(self, *, held: bool = True) -> None:
        self._held = held
        self._began = time.monotonic()
        self._wall = time.time()
        self._random = random.Random(3)
        self.page: dict[str, object] = {"url": None, "failure": None}
        self.chronicle = Chronicle()
        for step in range(1, STEPS + 1):
            wall = self._wall - (STEPS - step) * 11.0
            self.chronicle.curve.append(
                Point(attempt=int(step > FELL_AT + 40), step=step, wall=wall, reward=self._reward(step))
            )
        self._step = STEPS
        for number, (step, name) in enumerate(
            [(FELL_AT, "rollout-0733"), (AGAIN_AT, "rollout-0416")], start=1
        ):
            self._incident(number, step, name)
        self._state = self._now()

    def _reward(self, step: int) -> float | None:
        learned = 0.82 - 0.6 * math.exp(-step / 14_000)
        if FELL_AT <= step < FELL_AT + 40:
            return 0.0
        if step % 9_973 == 0:
            return None
        if step in DIPS:
            return 0.02
        return max(0.0, min(1.0, learned + 0.03 * math.sin(step / 700) + self._random.gauss(0, 0.045)))

    def _incident(self, number: int, step: int, server: str) -> None:
        wall = self._wall - (STEPS - step) * 11.0
        over = number == 1
        told = [
            ("opened", f"{server} died (exit 137); batch {step} was refused before its step"),
            ("action", f"{server} is started again, one rung down: mem_fraction_static 0.80 to 0.75"),
        ]
        if over:
            told.append(("resumed", "every server is proven; the run goes on, on probation"))
            told.append(
                ("resolved", f"reward back at {self._reward(step + 100):.2f}; no optimizer step on garbage")
            )
        self.chronicle.episodes[number] = Episode(
            number=number, reason=Reason.SERVER_DIED.value, server=server, onset_step=step, opened_step=step,
            opened_wall=wall if over else self._wall - 94, resumed_step=step + 1 if over else None,
            resumed_wall=wall + 71 if over else None, closed_step=step + 9 if over else None,
            closed_wall=wall + 160 if over else None, restarts=1, refused_batches=3,
            evidence=("exit 137", "31 of 32 rollouts failed", "kernel: OOM kill in its cgroup"),
            actions=("restart",),
        )  # fmt: skip
        for at, (what, text) in enumerate(told):
            self.chronicle.notices.append(
                Notice(
                    id=number * 10 + at,
                    wall=(wall if over else self._wall - 94) + 20 * at,
                    incident=number,
                    what=what,
                    reason=Reason.SERVER_DIED.value,
                    text=text,
                )
            )

    def _now(self) -> State:
        now = time.monotonic()
        servers = [
            Server(
                name=f"rollout-{at:04}",
                managed=True,
                state=ServerState.SERVING,
                since=now - 86_000 + at,
                weight_version=str(STEPS),
            )
            for at in range(SERVERS)
        ]
        at = 416  # one rack: machines fail in company
        for state, count, reason in STATES:
            for _ in range(count):
                servers[at] = replace(
                    servers[at], state=state, since=now - 94 - at % 7, reason=reason, restarts=1
                )
                at += 1 if state is ServerState.DEAD else 29
                at %= SERVERS
        incident = Incident(
            number=2,
            reason=Reason.SERVER_DIED,
            server="rollout-0416",
            onset_step=AGAIN_AT,
            opened_at=now - 94,
            restarts=1,
            refused_batches=3,
            evidence=("exit 137", "31 of 32 rollouts failed", "kernel: OOM kill in its cgroup"),
        )
        return State(
            settings=Settings(),
            mode=Mode.ACT,
            reward=RewardState(),
            phase=Phase.OPEN if self._held else Phase.CLOSED,
            phase_since=now - 94,
            servers=tuple(servers),
            trainer=Trainer(
                pid=4711, alive=True, step=STEPS, phase="HELD" if self._held else "ROLLOUT", beats_at=now,
                attempt=1, committed_step=STEPS - 1, weight_version=str(STEPS),
            ),
            gate=Gate(order=GateOrder.HOLD if self._held else GateOrder.GO, generation=17),
            incident=incident if self._held else None,
            incidents=2,
            refused_batches=3 if self._held else 0,
            rewards=(0.8,),
        )  # fmt: skip

    def go_on(self) -> None:
        """One more step."""
        self._step += 1
        point = Point(attempt=1, step=self._step, wall=time.time(), reward=self._reward(self._step))
        self.chronicle.curve.append(point)
        self.chronicle.recent.append((self.chronicle.curve.points, point))

    def status(self) -> Mapping[str, object]:
        """As the daemon makes it, at each asking."""
        names = {server.name: f"http://10.0.0.1/{server.name}" for server in self._state.servers}
        now = time.monotonic()
        trainer = replace(self._state.trainer, step=self._step, beats_at=now - 0.2)
        known = status.of(
            replace(self._state, trainer=trainer), run="math-grpo-70b", state_dir="/var/lib/stepguard/math",
            urls=names, now=now, started_at=self._began - 90_000, stream=None, notes=[], lost_rows=0,
            journal_failure=None,
        )  # fmt: skip
        gib = 1 << 30
        gpus = [
            {
                "index": at,
                "used_bytes": (60 + 2 * at) * gib,
                "total_bytes": 80 * gib,
                "temperature_c": 61 + at,
                "busy_percent": 90,
            }
            for at in range(8)
        ]
        host = {"available_bytes": 811 * gib, "total_bytes": 2015 * gib, "oom_kills": 1}
        return {**known, "gpus": gpus, "host": host, "page": self.page}

    def checkpoints(self) -> list[CheckpointDict]:
        """One each thousand steps; what was saved on garbage is bad."""
        return [
            {
                "step": step, "attempt": 0, "path": f"/ckpt/{step}", "verdict": "good", "reason": None,
                "proven": step < STEPS - 1000, "healthy_steps": 5, "quarantined": step == 42_000,
                "pinned": step >= STEPS - 2000, "gone": False,
            }
            for step in range(80_000, STEPS + 1, 2_000)
        ]  # fmt: skip

    def quiet_s(self) -> float:
        return 0.1

    async def ask(self, verb: str, who: str, why: str, args: Mapping[str, object]) -> Mapping[str, object]:
        del who, why, args
        return {"message": f"{verb}: taken in, and nothing is done: this run is made up"}


async def serve(*, held: bool) -> None:
    """Serve the large run until it is ended; its link is the first line."""
    run = LargeRun(held=held)
    with tempfile.TemporaryDirectory() as folder:
        page = PageServer(WebSettings(listen="127.0.0.1:0"), Path(folder))
        live = Live(run)
        serving = asyncio.ensure_future(page.serve(create_app(run, page.keys, live)))
        ending = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
        while page.url is None:  # noqa: ASYNC110 - of a fake's own second
            await asyncio.sleep(0.01)
        run.page = page.facts()
        print(json.dumps({"url": page.url, "code": page.keys.code("the benchmark")}), flush=True)
        while not ending.is_set():
            run.go_on()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ending.wait(), 1.0)
        live.end()  # first: a stream has no end of its own
        serving.cancel()
        await asyncio.wait({serving})


@contextlib.contextmanager
def large_run(*, held: bool = True) -> Iterator[tuple[int, str, str]]:
    """Its process, its address, and a link that opens it once."""
    with _start(["-m", "benchmarks.page", "serve", "held" if held else "going"]) as server:
        try:
            assert server.stdout is not None
            said = json.loads(server.stdout.readline())
            yield server.pid, said["url"], f"{said['url']}/#code={said['code']}"
        finally:
            server.terminate()


def _opened(browser: Any, url: str) -> dict[str, float]:
    """Open it as somebody does who was never there, and say when what was seen, in seconds."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.add_init_script(WATCH)
    page.goto(url, wait_until="commit")
    page.locator("#plot .scatterlayer .trace").first.wait_for(timeout=60_000)
    page.locator("#servers .heat").wait_for(timeout=60_000)
    page.wait_for_timeout(1500)
    seen = {name: at / 1000 for name, at in page.evaluate("window.seen").items()}
    early = page.evaluate("window.deaf")
    page.evaluate("window.deaf.length = 0")
    page.wait_for_timeout(5000)
    late = page.evaluate("window.deaf")
    context.close()
    return {**seen, "deaf": max(early, default=0) / 1000, "deaf_later": max(late, default=0) / 1000}


def _print_large(chromium: Any) -> None:
    with large_run() as (pid, url, _link):
        found = [_opened(chromium, url) for _ in range(OPENINGS)]
        before = _cpu_s(pid)
        time.sleep(5)
        alone = 100 * (_cpu_s(pid) - before) / 5
        page = chromium.new_page()
        page.goto(url)
        page.wait_for_timeout(3000)
        before = _cpu_s(pid)
        page.wait_for_timeout(10_000)
        share = 100 * (_cpu_s(pid) - before) / 10
        page.close()
    median = {name: statistics.median(one[name] for one in found) for name in found[0]}
    worst = max(one["state"] for one in found)
    print(f"{SERVERS:,} servers, {STEPS:,} steps, {OPENINGS} openings in a fresh browser context, medians:")
    print(
        f"interactive         {median['state']:6.2f} s    goal <= {GOAL_INTERACTIVE_S} s   worst {worst:.2f}"
    )
    print(f"  every server seen {median['tiles']:6.2f} s")
    print(f"  curve drawn       {median['curve']:6.2f} s")
    print(f"longest deafness    {median['deaf']:6.2f} s    while it opens")
    print(f"                    {median['deaf_later']:6.2f} s    in 5 s of going on")
    print(f"its daemon's part   {share:6.2f} % of a core for one page, {alone:.2f} % without")


def _print_small(chromium: Any, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        server = _start(["-c", SERVER])
        assert server.stdout is not None
        port = int(server.stdout.readline())
        config = Path(folder, "config.toml")
        config.write_text(
            f'[run]\nname = "bench"\nrun_dir = "{folder}/run"\nstate_dir = "{folder}/state"\n'
            f'[[servers]]\nname = "s"\nurl = "http://127.0.0.1:{port}"\nbackend = "none"\n'
            '[web]\nlisten = "127.0.0.1:0"\n'
        )
        daemon = _start(["-m", "stepguardd", "run", "--config", str(config)])
        try:
            _ready(Path(folder, "run"), time.monotonic())
            time.sleep(3)
            alone = _share(daemon.pid, seconds)
            asked = subprocess.run(
                [sys.executable, "-m", "stepguardd", "open", "--run-dir", f"{folder}/run"],
                capture_output=True, text=True, check=True, timeout=60,
            )  # fmt: skip
            page = chromium.new_page()
            page.goto(asked.stdout.strip())
            page.wait_for_timeout(3000)
            before = _cpu_s(daemon.pid)
            page.wait_for_timeout(seconds * 1000)
            watched = 100 * (_cpu_s(daemon.pid) - before) / seconds
        finally:
            for process in (daemon, server):
                process.send_signal(signal.SIGTERM)
                process.wait(20)
    print(f"daemon, page open   {watched:6.2f} % of a core   goal <= {GOAL_CORE} %   closed {alone:.2f}")


def _share(pid: int, seconds: float) -> float:
    before = _cpu_s(pid)
    time.sleep(seconds)
    return 100 * (_cpu_s(pid) - before) / seconds


def main() -> None:
    """Measure and print."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[0].endswith("page.py") else SECONDS
    path = shutil.which("chromium")
    if path is None:
        raise SystemExit("benchmarks.page: no chromium here")
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - only where a browser is

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        _print_large(chromium)
        _print_small(chromium, seconds)
        chromium.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        asyncio.run(serve(held=sys.argv[2:3] != ["going"]))
    else:
        main()
