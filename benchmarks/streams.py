"""
How fast and how small the readers of the metric stream are: `python -m benchmarks.streams [--megabytes 100]`.

The file is a W&B log of small rows (three metrics, as wandb 0.31 writes them: a summary record before each
history record). Speeds are of processor time, beside `json.loads` on the same rows in the same process;
memory beside `stepguard --version`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from senses.wandb_writer import WandbWriter, blob, framed, number
from stepguardd.sources.reward.wandb_log import WandbLog


def write_log(path: Path, megabytes: float) -> int:
    """Write a log of about that size; return the number of its records."""
    WandbWriter(path)
    records, num, step = 2, 2, 0
    size = path.stat().st_size
    with path.open("ab") as file:
        while size < megabytes * 1e6:
            piece = []
            for _ in range(1000):
                values = {"train/reward": step / 1e6, "loss": -0.5, "train/global_step": step, "_step": step}
                values |= {"_timestamp": 1.7e9 + step, "_runtime": 1.0}
                items = b"".join(blob(1, blob(2, k) + blob(16, json.dumps(v))) for k, v in values.items())
                piece.append(number(1, num + 1) + blob(3, items))
                piece.append(number(1, num + 2) + blob(2, items))
                num, step = num + 2, step + 1
            records += len(piece)
            data = framed(piece, size)
            file.write(data)
            size += len(data)
    return records


def read_log(path: Path) -> tuple[int, float]:
    reader = WandbLog(path)
    rows = 0
    begun = time.process_time()
    while True:
        rows += len(reader.poll())
        if reader.caught_up:
            return rows, time.process_time() - begun


def load_lines(count: int) -> float:
    """Decode as many small JSON lines; return seconds."""
    line = json.dumps(
        {"train/reward": 0.5, "loss": -0.5, "train/global_step": 7, "_step": 7, "_timestamp": 1.7e9}
    )
    begun = time.process_time()
    for _ in range(count):
        json.loads(line)
    return time.process_time() - begun


def rss_mb(*arguments: str) -> float:
    """Peak memory of `stepguard ARGUMENTS`, in a process of its own."""
    code = "import sys; from stepguard._command import main; sys.argv = ['stepguard', *sys.argv[1:]]; main()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"stepguard {' '.join(arguments)} ended with {child.returncode}")
    return usage.ru_maxrss / 1024


def main() -> None:
    """Write the file, read it three times, and print the best; the machine is rarely quiet."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--megabytes", type=float, default=100.0)
    megabytes = options.parse_args().megabytes
    with tempfile.TemporaryDirectory(dir=os.environ.get("STEPGUARD_BENCH_DIR")) as folder:
        path = Path(folder) / "run-bench.wandb"
        records = write_log(path, megabytes)
        rounds = [(read_log(path), load_lines(records // 10) * 10) for _ in range(3)]
        (rows, seconds), loads = min(rounds)
        version, stream = rss_mb("--version"), rss_mb("stream", str(path), "--json")
    print(f"W&B log of {megabytes:.0f} MB: {records} records, {rows} rows")
    speed = f"{records / seconds:,.0f} records/s of processor time (goal 100,000)"
    print(f"  {speed}, {loads / seconds:.2f} of json.loads on such a record")
    print(
        f"  memory of `stepguard stream`: {stream:.1f} MB, {stream - version:.1f} above --version (goal 20)"
    )


if __name__ == "__main__":
    main()
