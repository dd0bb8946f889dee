"""
The daemon's own load of weights, and its look at them, against a server of SGLang's contract.

The embedded server here, a real SGLang in tests/real_sglang.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import aiohttp
import httpx
import pytest

from stepguard_grpo.model import write_base_model
from stepguardd.core.events import WeightsLook
from stepguardd.core.proof import disagree
from stepguardd.effects.outcome import Outcome
from stepguardd.effects.weights import compare, push
from stepguardd.sources import sglang

pytestmark = pytest.mark.e2e


@pytest.fixture
def served(http: httpx.Client) -> Iterator[Path]:
    """The folder that is served; it is again at the end, under its version."""
    info = http.get("/model_info").json()
    yield Path(info["model_path"])
    http.post("/continue_generation", json={})
    body = {"model_path": info["model_path"], "weight_version": info["weight_version"]}
    assert http.post("/update_weights_from_disk", json=body).json()["success"] is True


def asked(url: str, what: Callable[[aiohttp.ClientSession], Awaitable[Outcome]]) -> Outcome:
    async def go() -> Outcome:
        async with sglang.client(url) as http:
            return await what(http)

    return asyncio.run(go())


def pushed(url: str, folder: Path, version: str, *, anew: bool = False) -> Outcome:
    pattern = f"{folder}/{{version}}"
    return asked(url, lambda http: push(http, pattern=pattern, version=version, timeout_s=30, anew=anew))


def look(url: str) -> WeightsLook:
    """What one server shows, twice at once: what a server says of itself it says again."""
    outcome = asked(url, lambda http: compare(("a", http), ("b", http), timeout_s=30))
    one, two = outcome.looks
    assert (one.version, one.checksum, one.layout) == (two.version, two.checksum, two.layout)
    assert not disagree(one.greedy, two.greedy)
    return one


def test_a_push_is_served_and_shows_its_own_weights(
    server_url: str, http: httpx.Client, served: Path, tmp_path: Path
) -> None:
    write_base_model(tmp_path / "20", seed=5)
    assert pushed(server_url, tmp_path, "20").ok, "whatever an earlier test left is replaced"
    first = look(server_url)
    assert len(first.greedy) == 8
    assert all(token.log_prob is not None for token in first.greedy)
    write_base_model(tmp_path / "21", seed=21)
    outcome = pushed(server_url, tmp_path, "21")
    assert (outcome.ok, outcome.detail) == (True, "version 21")
    other = look(server_url)
    assert other.version == "21"
    assert other.checksum != first.checksum
    assert other.layout == first.layout
    assert disagree(first.greedy, other.greedy)


def test_weights_of_another_model_are_refused_before_anything_is_loaded(
    server_url: str, http: httpx.Client, served: Path, tmp_path: Path
) -> None:
    write_base_model(tmp_path / "22", seed=22)
    config = json.loads((tmp_path / "22" / "config.json").read_text())
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (tmp_path / "22" / "config.json").write_text(json.dumps(config))
    before = look(server_url)
    outcome = pushed(server_url, tmp_path, "22")
    assert not outcome.ok
    assert 'architectures is ["Qwen2ForCausalLM"], and ["LlamaForCausalLM"] in the server' in outcome.detail
    assert "nothing was loaded" in outcome.detail
    after = look(server_url)
    assert (after.version, after.checksum) == (before.version, before.checksum)


def test_what_is_there_is_loaded_again_only_when_it_is_doubted(
    server_url: str, http: httpx.Client, served: Path, tmp_path: Path
) -> None:
    write_base_model(tmp_path / "23", seed=23)
    assert pushed(server_url, tmp_path, "23").ok
    right = look(server_url)
    # Somebody's script: other weights under the same name.
    write_base_model(tmp_path / "foreign", seed=5)
    body = {"model_path": str(tmp_path / "foreign"), "weight_version": "23"}
    assert http.post("/update_weights_from_disk", json=body).json()["success"] is True
    assert disagree(look(server_url).greedy, right.greedy)
    assert pushed(server_url, tmp_path, "23").needless
    assert disagree(look(server_url).greedy, right.greedy), "the version alone was believed"
    assert pushed(server_url, tmp_path, "23", anew=True).ok
    again = look(server_url)
    assert again.checksum == right.checksum
    assert not disagree(again.greedy, right.greedy)


def test_a_load_into_a_paused_server_with_requests_is_believed_by_its_version_alone(
    server_url: str, http: httpx.Client, served: Path, tmp_path: Path
) -> None:
    """SGLang 0.5.23 answers 400 and keeps its old version, the weights changed; the next load is whole."""
    write_base_model(tmp_path / "24", seed=24)
    http.post("/slow_down", json={"forward_sleep_time": 0.1})

    async def go() -> tuple[Outcome, str, Outcome, httpx.Response]:
        async with (
            sglang.client(server_url) as ours,
            httpx.AsyncClient(base_url=server_url, timeout=60, trust_env=False) as theirs,
        ):
            body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 12, "ignore_eos": True}}
            rollout = asyncio.create_task(theirs.post("/generate", json=body))
            await asyncio.sleep(0.3)
            await theirs.post("/pause_generation", json={"mode": "in_place"})
            pattern = f"{tmp_path}/{{version}}"
            paused = await push(ours, pattern=pattern, version="24", timeout_s=30)
            says = str((await theirs.get("/model_info")).json()["weight_version"])
            await theirs.post("/slow_down", json={"forward_sleep_time": None})
            await theirs.post("/continue_generation", json={})
            answer = await rollout
            return paused, says, await push(ours, pattern=pattern, version="24", timeout_s=30), answer

    paused, says, later, rollout = asyncio.run(go())
    assert paused.ok is (says == "24")
    assert paused.ok or f"it serves version {says}, not 24" in paused.detail
    assert later.ok, later.detail
    assert http.get("/model_info").json()["weight_version"] == "24"
    assert rollout.status_code == 200
