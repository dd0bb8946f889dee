"""
How soon a decision reaches people: `python -m benchmarks.alerts [INCIDENTS]`.

A real daemon, a trainer of a few lines that reports a loss that is not a number, and an HTTP server that
takes the webhook. Measured from the HOLD on the gate page, which is the decision, to the message in the
receiver's hands. A person is needed here, so it goes at once; an opening that may heal by itself is told a
second later, on purpose.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import math
import queue
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.daemon import _ready, _start
from stepguard import Guard, StopRequested
from stepguard.gate import GatePage, Order
from stepguardd.control.client import ControlClient

INCIDENTS = 8
GOAL_S = 5.0


def main() -> None:
    """Measure and print."""
    logging.getLogger("stepguard").setLevel(logging.CRITICAL)  # the trainer's word on each hold
    given = len(sys.argv) > 1 and sys.argv[0].endswith("alerts.py")
    count = int(sys.argv[1]) if given else INCIDENTS
    with tempfile.TemporaryDirectory() as name, _receiver() as (url, arrived):
        folder = Path(name)
        secret = folder / "hook"
        secret.touch(mode=0o600)
        secret.write_text(url)
        config = folder / "config.toml"
        config.write_text(
            f'[run]\nname = "bench"\nmode = "hold"\nrun_dir = "{folder}/run"\nstate_dir = "{folder}/state"\n'
            '[web]\nenabled = false\n[alerts]\ninternal_hosts = ["127.0.0.1"]\nmax_per_hour = 1000\n'
            f'[webhook]\nurl_secret = "{secret}"\n'
        )
        daemon = _start(["-m", "stepguardd", "run", "--config", str(config)])
        try:
            _ready(folder / "run", time.monotonic())
            found = sorted(_incidents(folder / "run", arrived, count))
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(20)
    print(f"decision to handed over, {count} incidents, webhook on loopback:")
    print(f"  median {found[len(found) // 2]:.2f} s   worst {found[-1]:.2f} s   goal <= {GOAL_S} s")


class _Trainer(threading.Thread):
    """Takes steps until it is told to end; held where the daemon holds it."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(daemon=True)
        self.broken = False
        self.ending = False
        self._guard = Guard(run_dir, heartbeat_s=0.2)

    def run(self) -> None:
        step = 0
        with contextlib.suppress(StopRequested):
            while not self.ending:
                step += 1
                self._guard.admit(step, [1] * 4, rewards=[0.6, 0.7, 0.8, 0.7])
                self._guard.before_step(step)
                loss = math.nan if self.broken else 0.1
                self._guard.after_step(step, reward=0.7, metrics={"loss": loss, "grad_norm": 0.4})
                time.sleep(0.05)
        self._guard.close()


def _incidents(run_dir: Path, arrived: queue.Queue[tuple[float, str]], count: int) -> Iterator[float]:
    trainer = _Trainer(run_dir)
    trainer.start()
    page = GatePage.open(run_dir / "gate", writable=False)
    with contextlib.closing(page), ControlClient(run_dir / "control.sock") as control:
        for _ in range(count):
            time.sleep(1.0)
            trainer.broken = True
            _until(page, Order.HOLD)
            decided = time.monotonic()
            trainer.broken = False
            yield _next(arrived, "opened") - decided
            control.ask("resume", "the next round")
            _until(page, Order.GO)
            _next(arrived, "resolved")
        trainer.ending = True
        trainer.join(20)


def _until(page: GatePage, order: Order) -> None:
    deadline = time.monotonic() + 30
    while (half := page.daemon()) is None or half.order is not order:
        if time.monotonic() > deadline:
            raise SystemExit(f"the gate did not come to {order.name}")
        time.sleep(0.001)


def _next(arrived: queue.Queue[tuple[float, str]], kind: str) -> float:
    while True:
        at, what = arrived.get(timeout=60)
        if what == kind:
            return at


@contextlib.contextmanager
def _receiver() -> Iterator[tuple[str, queue.Queue[tuple[float, str]]]]:
    arrived: queue.Queue[tuple[float, str]] = queue.Queue(maxsize=1000)

    class Takes(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            arrived.put((time.monotonic(), json.loads(body)["kind"]))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            del format, args

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Takes)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/", arrived
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


if __name__ == "__main__":
    main()
