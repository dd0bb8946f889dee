"""The API keeps what its description says: asked for all that it allows, and for what it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from daemon_parts.own_daemons import OwnDaemons
from stepguardd import proc

pytestmark = pytest.mark.e2e
# Without an end by its nature: the live stream. tests/browser reads it.
ENDLESS = "/api/v1/live"


class Idle(OwnDaemons):
    """A daemon that has nothing to watch, and a page."""

    def started(self) -> tuple[proc.Proc, ...]:
        return ()


def test_every_answer_is_as_the_description_says(tmp_path: Path) -> None:
    run = Idle(tmp_path, {"web": {"listen": "127.0.0.1:0"}})
    try:
        run.daemon()
        run.until(lambda: (run.status().get("page") or {}).get("url"), "the page is there")
        url = run.status()["page"]["url"]
        token = (run.state_dir / "web.token").read_text().strip()
        asks = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/api/v1/openapi.json"]
        asks += ["--header", f"Authorization: Bearer {token}", "--exclude-path", ENDLESS]
        asks += ["--generation-deterministic", "--max-examples", "8", "--no-color"]
        done = subprocess.run(asks, cwd=tmp_path, capture_output=True, text=True, timeout=170, check=False)
        assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
        described = httpx.get(f"{url}/api/v1/openapi.json", timeout=10, trust_env=False).json()["paths"]
        assert ENDLESS in described
        asked = sum(len(methods) for methods in described.values()) - 1
        assert f"Tested: {asked}\n" in done.stdout, "it did ask all of it"
        assert run.daemons[-1].poll() is None
    finally:
        run.close()
