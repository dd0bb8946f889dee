"""A real SGLang's own dump names the prompt that killed it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from grpo.server_process import free_port
from requirements import require, required
from stepguard_grpo.model import write_base_model
from stepguardd.demo.servers import ServerProgram
from stepguardd.effects.backends.contract import NO_DUMPS
from stepguardd.incidents.crash_dumps import FLAG, told

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_a_real_crash_dump_names_the_prompt_without_an_answer(program: ServerProgram, tmp_path: Path) -> None:
    if not required("sglang-faults"):
        require("sglang-faults", "a server of its own takes a minute; ask by STEPGUARD_REQUIRE")
    write_base_model(tmp_path / "base", seed=0)
    port, log = free_port(), tmp_path / "server.log"
    began = time.time()
    with log.open("wb") as out:
        server = subprocess.Popen(
            [*program.command(tmp_path / "base", port), FLAG, str(tmp_path / "dumps")],
            env=os.environ | dict(program.environment) | NO_DUMPS,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + program.start_timeout_s
        while b"fired up and ready to roll" not in log.read_bytes():
            assert server.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            time.sleep(0.2)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
            body = {"input_ids": [10, 1, 2, 11], "sampling_params": {"max_new_tokens": 4}}
            assert http.post("/generate", json=body).status_code == 200
            with contextlib.suppress(httpx.TransportError):
                http.post("/generate", json=body | {"input_ids": [10, 999_999, 11]})
        assert server.wait(60) != 0, "it did not die of the prompt"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)
    (sentence,) = told({"s": str(tmp_path / "dumps")}, began, time.time())
    assert "1 prompt was in flight: ids 10 999999 11 (" in sentence
