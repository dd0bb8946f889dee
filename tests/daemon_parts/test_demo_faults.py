"""The demo's faults that are calls, against the embedded server."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from grpo.server_process import ServerProcess
from stepguardd.demo.faults import load_weights, pause_generation
from stepguardd.sources.sglang import open_requests

pytestmark = pytest.mark.e2e


def version(http: httpx.Client) -> str:
    return str(http.get("/model_info").json()["weight_version"])


def test_foreign_weights_are_loaded_under_rollouts_and_never_between_them(
    embedded: ServerProcess, base_model: Path
) -> None:
    """Between rollouts a trainer may be pushing, and two loads at once kill a paused SGLang."""
    with embedded.client() as http:
        before = version(http)
        assert load_weights(embedded.url, base_model, "foreign") is None
        assert version(http) == before

        pause_generation(embedded.url, "in_place")
        body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 2}}
        with ThreadPoolExecutor(1) as pool:
            rollout = pool.submit(http.post, "/generate", json=body)
            while not open_requests(http.get("/metrics").content):
                assert not rollout.done(), "it was not held"
            assert load_weights(embedded.url, base_model, "foreign") is not None
            made_by = rollout.result(timeout=30).json()["meta_info"]["weight_version"]
        assert made_by == version(http) == "foreign"
        body = {"model_path": str(base_model), "weight_version": before}
        assert http.post("/update_weights_from_disk", json=body).is_success
