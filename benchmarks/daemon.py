"""
What the daemon costs: `python -m benchmarks.daemon [SECONDS]`.

One server is probed at the defaults, the page is on, and a trainer's half of the gate page is there. In the
same run stands a bare loop that sends the same requests a second with aiohttp and does nothing with the
answers: what any watcher pays.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

SECONDS = 30.0
GOAL_CORE, GOAL_RSS_MB, GOAL_READY_S = 0.7, 100.0, 1.0

SERVER = """
import http.server, json
METRICS = "".join(
    f'sglang:figure_{n}{{model_name="m",tp_rank="{rank}"}} {n * 1.5}\\n'
    for n in range(150)
    for rank in range(2)
) + "sglang:num_running_reqs 0\\nsglang:generation_tokens_total 10\\n"
class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = METRICS if self.path.startswith("/metrics") else json.dumps({"weight_version": "1"})
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())
    do_POST = do_GET
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
print(server.server_address[1], flush=True)
server.serve_forever()
"""

BARE = """
import asyncio, sys, aiohttp
async def live(url):
    async with aiohttp.ClientSession() as client:
        print("ready", flush=True)
        while True:
            for path in ("/ready", "/model_info", "/metrics"):
                async with client.get(url + path) as reply:
                    await reply.read()
            await asyncio.sleep(1)
asyncio.run(live(sys.argv[1]))
"""


def main() -> None:
    """Measure and print."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[0].endswith("daemon.py") else SECONDS
    with tempfile.TemporaryDirectory() as folder:
        server = _start(["-c", SERVER])
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        config = Path(folder, "config.toml")
        config.write_text(
            f'[run]\nname = "bench"\nrun_dir = "{folder}/run"\nstate_dir = "{folder}/state"\n'
            f'[[servers]]\nname = "s"\nurl = "{url}"\nbackend = "none"\n[web]\nlisten = "127.0.0.1:0"\n'
        )
        began = time.monotonic()
        daemon = _start(["-m", "stepguardd", "run", "--config", str(config)])
        bare = None
        try:
            ready_s = _ready(Path(folder, "run"), began)
            bare = _start(["-c", BARE, url])
            assert bare.stdout is not None
            bare.stdout.readline()
            time.sleep(3.0)
            before = [_cpu_s(daemon.pid), _cpu_s(bare.pid)]
            time.sleep(seconds)
            share, floor = (
                100 * (_cpu_s(pid) - old) / seconds
                for pid, old in zip((daemon.pid, bare.pid), before, strict=True)
            )
            rss_mb = psutil.Process(daemon.pid).memory_info().rss / 1e6
            bare_mb = psutil.Process(bare.pid).memory_info().rss / 1e6
        finally:
            for process in (daemon, bare, server):
                if process is not None:
                    process.send_signal(signal.SIGTERM)
                    process.wait(20)
        print(f"daemon, 1 server    {share:6.2f} % of a core   goal <= {GOAL_CORE} %")
        print(f"  three GETs alone  {floor:6.2f} %   the daemon: {share / floor:.1f} of it")
        print(f"resident            {rss_mb:6.0f} MB   goal <= {GOAL_RSS_MB:.0f} MB   bare {bare_mb:.0f}")
        print(f"ready after         {ready_s:6.2f} s    goal <= {GOAL_READY_S} s")


def _start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def _ready(run_dir: Path, began: float) -> float:
    """Seconds until the daemon answers for its run."""
    while time.monotonic() - began < 60:
        asked = subprocess.run(
            ["curl", "-s", "--unix-socket", str(run_dir / "control.sock"), "http://run/api/v1/status"],
            capture_output=True,
            check=False,
            timeout=10,
        )
        if asked.returncode == 0 and json.loads(asked.stdout or "{}").get("run") == "bench":
            return time.monotonic() - began
        time.sleep(0.02)
    raise SystemExit("the daemon did not answer within a minute")


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    main()
