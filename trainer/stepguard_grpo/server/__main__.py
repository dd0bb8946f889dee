"""`python -m stepguard_grpo.server --model-path DIR --port P`: the arguments, and nothing else."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stepguard_grpo.server",
        description="A small inference server with SGLang's HTTP contract and fault behaviour, on the CPU.",
    )
    add = parser.add_argument
    add("--model-path", required=True, metavar="DIR", help="config.json and model.safetensors of a Llama")
    add("--port", required=True, type=_port, metavar="P")
    add("--host", default="127.0.0.1")
    add(
        "--weight-version",
        default="default",
        metavar="V",
        help="served until weights are pushed",
    )
    add("--served-model-name", default=None, metavar="NAME", help="default: the model path")
    add("--max-running-requests", type=_positive_int, default=64, metavar="N", help="size of a batch")
    add("--max-total-tokens", type=_positive_int, default=8192, metavar="N", help="reported capacity")
    add("--mem-fraction-static", type=_share, default=0.8, metavar="F", help="of the GPU that is pretended")
    add("--request-bytes", type=int, default=0, metavar="N", help="memory that each running request takes")
    add("--pretended-gpu", default=None, metavar="FILE", help="it says what the GPU has, and others took")
    add("--enable-metrics", action="store_true", help="accepted for SGLang's sake; /metrics is always there")
    add("--health-timeout-s", type=float, default=float(os.environ.get("SGLANG_HEALTH_CHECK_TIMEOUT", "20")))
    add(
        "--crash-diagnostics-s",
        type=float,
        default=5.0,
        help="how long a crash blocks all connections; SGLANG_PYSPY_DUMP_BEFORE_CRASH=0 makes it 0",
    )
    add("--shutdown-grace-s", type=float, default=15.0, help="how long SIGTERM waits for the scheduler")
    add("--warmup-timeout-s", type=float, default=120.0)
    return parser


def _port(text: str) -> int:
    port = int(text)
    if not 1 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{port} is no port; give 1 to 65535")
    return port


def _positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _share(text: str) -> float:
    share = float(text)
    if not 0.0 < share <= 1.0:
        raise argparse.ArgumentTypeError(f"{share} is no share; give more than 0, up to 1")
    return share


def main(arguments: list[str] | None = None) -> int:
    """Parse, then serve."""
    given = vars(_parser().parse_args(arguments))
    given.pop("enable_metrics")
    given["served_model_name"] = given["served_model_name"] or given["model_path"]
    if os.environ.get("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "1").lower() in ("0", "false"):
        given["crash_diagnostics_s"] = 0.0
    logging.basicConfig(
        level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S", stream=sys.stderr
    )
    from stepguard_grpo.server.http import Settings  # noqa: PLC0415 - arguments may be wrong: first those
    from stepguard_grpo.server.lifecycle import serve  # noqa: PLC0415

    return asyncio.run(serve(Settings(**given)))


if __name__ == "__main__":
    sys.exit(main())
