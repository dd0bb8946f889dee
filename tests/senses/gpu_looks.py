"""
Looks at the GPUs for the tests of `gpu`, as a program: no driver library can be exchanged within a process.

For each line on stdin it prints the reading as one line of JSON: "poll NOW" what is known by then, "settle
NOW" what the driver says when it is asked then.
"""

import dataclasses
import json
import sys
import time

from stepguardd.sources.gpu import GpuSense


def main() -> None:
    sense = GpuSense(timeout_s=5.0)
    for line in sys.stdin:
        word, now = line.split()
        reading = sense.poll(float(now))
        if word == "settle":
            for _ in range(2000):
                if reading.asked == float(now):
                    break
                time.sleep(0.002)
                reading = sense.poll(float(now))
        print(json.dumps(dataclasses.asdict(reading)), flush=True)


if __name__ == "__main__":
    main()
