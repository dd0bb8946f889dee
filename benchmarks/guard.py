"""
The guard's figures: `python -m benchmarks.guard`.

Each stands beside something measured in the same run, because the absolute ones say as much about the machine
as about the guard.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

from stepguard.gate import SEQUENCE_WORD, DaemonHalf, GatePage, Order
from stepguard.guard import Guard
from stepguard.reports import REPORT_BYTES_MAX

HOUR_NS = 3_600_000_000_000

JUDGE = """
import os, socket, sys, time
from dataclasses import replace
from stepguard.gate import GatePage
from stepguard.reports import REPORT_BYTES_MAX, parse_report
run_dir = sys.argv[1]
page = GatePage.create(run_dir + "/gate")
half = page.daemon()
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sock.bind(run_dir + "/reports.sock")
print("ready", flush=True)
while True:
    report = parse_report(sock.recv(REPORT_BYTES_MAX + 1))
    if report["kind"] == "batch":
        half = replace(half, judged_batch=report["batch"], judged_step=report["step"], judged_ok=True)
        page.publish(half)
"""

ECHO = """
import socket, sys
here, there = sys.argv[1] + "/echo", sys.argv[1] + "/back"
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sock.bind(here)
print("ready", flush=True)
while True:
    sock.sendto(sock.recv(65537), there)
"""


def go_page(run_dir: Path) -> GatePage:
    """A page on GO whose lease outlives the benchmark."""
    page = GatePage.create(run_dir / "gate")
    page.publish(DaemonHalf(order=Order.GO, generation=1, lease_deadline_ns=time.monotonic_ns() + HOUR_NS))
    return page


def mean_ns(statement: str, names: dict[str, object], number: int = 2_000) -> tuple[float, float]:
    """Mean over all runs, and the best run, of one execution in ns; many short runs, few disturbed."""
    runs = timeit.repeat(statement, globals=names, number=number, repeat=300)
    return statistics.fmean(runs) / number * 1e9, min(runs) / number * 1e9


def before_step_on_go() -> None:
    """`before_step` on GO all in, beside the gate word alone, a clock reading and a `stat`."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        page = go_page(run_dir)
        names: dict[str, object] = {
            "page": page.words,
            "at": SEQUENCE_WORD,
            "path": str(run_dir / "gate"),
            "os": os,
        }
        names["go"] = page.words[SEQUENCE_WORD]
        names["clock"] = time.monotonic_ns
        with Guard(run_dir) as guard:
            names["before_step"] = guard.before_step
            guard.before_step(1)
            step, word = mean_ns("before_step(188)", names), mean_ns("page[at] == go", names)
            clock, stat = mean_ns("clock()", names), mean_ns("os.stat(path)", names)
            nothing = mean_ns("nothing(188)", {"nothing": lambda step: None})
        page.close()
    print(f"before_step on GO   mean {step[0]:6.0f} ns   best {step[1]:6.0f} ns   goal <= 1000 ns")
    print(f"  the gate word     mean {word[0]:6.0f} ns   best {word[1]:6.0f} ns   goal <= 150 ns")
    print(f"  a clock reading   mean {clock[0]:6.0f} ns   an empty call {nothing[0]:.0f} ns")
    print(f"  a stat            mean {stat[0]:6.0f} ns")
    print(print(f"  best by best: {step[1] / stat[1]:.2f} of a stat, {step[1] / nothing[1]:.1f} empty calls"))


def import_time() -> None:
    """What importing costs, beside asyncio's import."""

    def cost_us(statement: str) -> float:
        """Median of the cumulative time of the import that ends last: the statement's own."""
        found = []
        for _ in range(9):
            command = [sys.executable, "-X", "importtime", "-c", statement]
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
            found.append(float(lines[-1].split("|")[1]))
        return statistics.median(found)

    package, guard, asyncio = (
        cost_us(s) for s in ("import stepguard", "import stepguard.guard", "import asyncio")
    )
    guard += package
    print(f"import stepguard    {package / 1000:6.1f} ms   with Guard {guard / 1000:.1f} ms   goal <= 50 ms")
    print(f"  asyncio alone     {asyncio / 1000:6.1f} ms: Guard costs {guard / asyncio:.2f} of it")


def admit_round_trip(rounds: int = 500) -> None:
    """`admit` to the verdict of a process of its own, beside a bare datagram there and back."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        go_page(run_dir).close()
        judge = started(JUDGE, folder)
        echo = started(ECHO, folder)
        try:
            with Guard(run_dir) as guard:
                items, rewards = ["a"] * 64, [1.0, 0.0] * 32
                admits = _timed(lambda: guard.admit(1, items, rewards=rewards), rounds)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.bind(f"{folder}/back")

                def there_and_back() -> None:
                    sock.sendto(b"x" * 300, f"{folder}/echo")
                    sock.recv(REPORT_BYTES_MAX)

                echoes = _timed(there_and_back, rounds)
        finally:
            for process in (judge, echo):
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()
    print(f"admit to verdict    p50 {admits[0]:5.2f} ms   p99 {admits[1]:5.2f} ms   goal p99 <= 5 ms")
    print(f"  bare datagrams    p50 {echoes[0]:5.2f} ms   p99 {echoes[1]:5.2f} ms")
    print(f"  admit takes {admits[0] / echoes[0]:.1f} times a datagram there and back")


def started(code: str, folder: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def _timed(act: object, rounds: int) -> tuple[float, float]:
    """Median and 99th percentile in ms."""
    assert callable(act)
    spans = []
    for _ in range(rounds):
        began = time.perf_counter_ns()
        act()
        spans.append((time.perf_counter_ns() - began) / 1e6)
    cuts = statistics.quantiles(spans, n=100)
    return cuts[49], cuts[98]


def main() -> None:
    """All of them."""
    before_step_on_go()
    import_time()
    admit_round_trip()


if __name__ == "__main__":
    main()
