"""
SGLang's HTTP contract, as a trainer and a watchdog rely on it.

Each test needs a URL and nothing else, so that a real server can be put under the same tests
(STEPGUARD_CONTRACT_URL). Each leaves the server as it found it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from stepguard_grpo.model import write_base_model
from stepguardd.sources.sglang import read_metrics

pytestmark = pytest.mark.e2e

PROMPT = [10, 1, 2, 3, 4, 11]
GREEDY = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}


def generate(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/generate", json={"input_ids": PROMPT, "sampling_params": GREEDY} | body)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture
def slow(http: httpx.Client) -> Iterator[None]:
    """Each forward pass takes 0.2 s."""
    assert http.post("/slow_down", json={"forward_sleep_time": 0.2}).status_code == 200
    yield
    assert http.post("/slow_down", json={"forward_sleep_time": None}).json() is None


def until(condition: Any, what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def running_requests(http: httpx.Client) -> int:
    """How many generations are open, by the one figure that does not lag."""
    name = 'sglang:http_requests_active{endpoint="/generate",method="POST"}'
    lines = http.get("/metrics").text.splitlines()
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith(name))


def tokens(http: httpx.Client) -> int:
    """Tokens so far, those of the prompts among them; the scheduler's own count."""
    return read_metrics(http.get("/metrics").content)[1] or 0


# Health and information


@pytest.mark.parametrize("path", ["/health", "/health_generate"])
def test_health_is_a_real_generation_and_takes_at_least_a_second(http: httpx.Client, path: str) -> None:
    began = time.monotonic()
    response = http.get(path)
    assert (response.status_code, response.content) == (200, b"")
    assert time.monotonic() - began >= 1.0  # a contract of the server, not a figure of ours


@pytest.mark.parametrize("path", ["/ready", "/ping"])
def test_flags_are_answered_at_once(http: httpx.Client, path: str) -> None:
    assert http.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info_names_path_and_weight_version(http: httpx.Client, path: str) -> None:
    info = http.get(path).json()
    assert {"model_path", "tokenizer_path", "is_generation", "weight_version", "served_model_name"} <= set(
        info
    )
    assert isinstance(info["weight_version"], str)


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info_carries_arguments_and_internal_states(http: httpx.Client, path: str) -> None:
    info = http.get(path).json()
    assert {"version", "model_path", "max_total_num_tokens", "launch_command", "startup_time"} <= set(info)
    assert "last_gen_throughput" in info["internal_states"][0]


def test_loads_are_a_fresh_snapshot(http: httpx.Client) -> None:
    load = http.get("/v1/loads").json()["loads"][0]
    assert {
        "num_running_reqs",
        "num_waiting_reqs",
        "num_used_tokens",
        "token_usage",
        "gen_throughput",
    } <= set(load)
    seen = load["timestamp"]
    until(lambda: http.get("/v1/loads").json()["loads"][0]["timestamp"] > seen, "a newer snapshot")


def test_models_are_listed_as_openai_does(http: httpx.Client) -> None:
    answer = http.get("/v1/models").json()
    assert answer["object"] == "list"
    assert answer["data"][0]["max_model_len"] > 0


def test_metrics_count_requests_and_tokens_in_the_text_format(http: httpx.Client) -> None:
    def value(name: str) -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"sglang:{name}{{"))

    requests, tokens = value("num_requests_total"), value("generation_tokens_total")
    assert generate(http).status_code == 200
    until(lambda: value("num_requests_total") >= requests + 1, "a counted request")
    until(lambda: value("generation_tokens_total") >= tokens + 4, "counted tokens")
    page = http.get("/metrics").text
    for name in ("num_running_reqs", "num_queue_reqs", "token_usage", "gen_throughput", "cache_hit_rate"):
        assert f"# TYPE sglang:{name} gauge" in page
    assert "sglang:e2e_request_latency_seconds_bucket" in page


# Generation


def test_generate_gives_ids_and_says_what_made_them(http: httpx.Client) -> None:
    answer = generate(http, rid="a-name-of-ours").json()
    meta = answer["meta_info"]
    assert len(answer["output_ids"]) == 4
    assert meta["id"] == "a-name-of-ours"
    assert meta["finish_reason"] == {"type": "length", "length": 4}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (6, 4)
    assert meta["weight_version"] == http.get("/model_info").json()["weight_version"]
    assert meta["e2e_latency"] > 0


def test_log_probabilities_come_as_triples(http: httpx.Client) -> None:
    answer = generate(http, return_logprob=True).json()
    triples = answer["meta_info"]["output_token_logprobs"]
    assert [token for _, token, _ in triples] == answer["output_ids"]
    assert all(log_prob <= 0 and text is None for log_prob, _, text in triples)


def test_a_list_of_prompts_gives_a_list(http: httpx.Client) -> None:
    answer = generate(http, input_ids=[PROMPT, PROMPT[:4]]).json()
    assert [one["meta_info"]["prompt_tokens"] for one in answer] == [6, 4]


def test_n_copies_of_one_prompt_give_a_list(http: httpx.Client) -> None:
    params = {"temperature": 1.0, "max_new_tokens": 4, "ignore_eos": True, "n": 3}
    assert len(generate(http, sampling_params=params).json()) == 3


def test_unknown_keys_beside_the_known_ones_are_ignored(http: httpx.Client) -> None:
    assert generate(http, no_such_key=1).status_code == 200


def test_an_unknown_sampling_key_is_refused_with_a_plain_string(http: httpx.Client) -> None:
    response = generate(http, sampling_params={"max_tokens": 4})
    assert response.status_code == 400
    assert "unknown field" in response.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        {"input_ids": []},
        {"sampling_params": {"temperature": -1.0}},
        {"sampling_params": {"top_p": 0.0}},
        {"sampling_params": {"max_new_tokens": -1}},
        {"sampling_params": {"max_new_tokens": 1_000_000}},
        {"input_ids": [1] * 100_000},
    ],
)
def test_what_cannot_be_generated_is_refused_with_a_message(http: httpx.Client, body: dict[str, Any]) -> None:
    response = generate(http, **body)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"input_ids": "no"}', b'{"input_ids": [1.5]}'])
def test_what_is_no_request_is_refused_in_openai_s_shape(http: httpx.Client, content: bytes) -> None:
    response = http.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["object"] == "error"


def test_generate_takes_no_get(http: httpx.Client) -> None:
    assert http.get("/generate").status_code == 405


# Abort, pause, flush


@pytest.mark.usefixtures("slow")
def test_an_aborted_request_ends_well_with_what_it_has(http: httpx.Client, pool: ThreadPoolExecutor) -> None:
    params = GREEDY | {"max_new_tokens": 50}
    call = pool.submit(generate, http, rid="going", sampling_params=params)
    until(lambda: running_requests(http) > 0, "the request to run")
    assert http.post("/abort_request", json={"rid": "going"}).content == b""
    answer = call.result(timeout=10)
    assert answer.status_code == 200
    assert answer.json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert answer.json()["meta_info"]["completion_tokens"] < 50


@pytest.mark.usefixtures("slow")
def test_abort_all_ends_everyone(http: httpx.Client, pool: ThreadPoolExecutor) -> None:
    params = GREEDY | {"max_new_tokens": 50}
    calls = [pool.submit(generate, http, sampling_params=params) for _ in range(3)]
    until(lambda: running_requests(http) >= 3, "three requests to run")
    assert http.post("/abort_request", json={"abort_all": True}).status_code == 200
    ends = [call.result(timeout=10).json()["meta_info"]["finish_reason"]["type"] for call in calls]
    assert ends == ["abort"] * 3


def test_aborting_an_unknown_request_is_no_error(http: httpx.Client) -> None:
    assert http.post("/abort_request", json={"rid": "never-seen"}).status_code == 200


def test_a_pause_needs_a_body_and_a_known_mode(http: httpx.Client) -> None:
    assert http.post("/pause_generation").status_code == 400
    assert http.post("/pause_generation", json={"mode": "sometimes"}).status_code == 400
    assert http.get("/ready").status_code == 200


@pytest.mark.parametrize("mode", ["abort", "in_place", "retract"])
def test_while_paused_new_requests_wait_and_the_flags_say_so(
    http: httpx.Client, pool: ThreadPoolExecutor, mode: str
) -> None:
    for _ in range(2):  # idempotent
        answer = http.post("/pause_generation", json={"mode": mode})
        assert answer.json() == {"message": "Generation paused successfully.", "status": "ok"}
    try:
        call = pool.submit(generate, http)
        assert http.get("/ready").status_code == 503
        assert http.get("/model_info").status_code == 200
        assert http.get("/server_info").status_code == 200  # a paused server is no frozen one
        assert not call.done()
    finally:
        answer = http.post("/continue_generation", json={})
    assert answer.json() == {"message": "Generation continued successfully.", "status": "ok"}
    assert len(call.result(timeout=10).json()["output_ids"]) == 4
    assert http.get("/ready").status_code == 200


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize(("mode", "end"), [("abort", "abort"), ("in_place", "length"), ("retract", "length")])
def test_what_ran_when_paused_ends_as_the_mode_says(
    http: httpx.Client, pool: ThreadPoolExecutor, mode: str, end: str
) -> None:
    before = tokens(http)
    call = pool.submit(generate, http, sampling_params=GREEDY | {"max_new_tokens": 20})
    # The parent counts a request before its scheduler has it, and one that comes later finds the pause.
    until(lambda: tokens(http) > before, "the request to be in the scheduler")
    http.post("/pause_generation", json={"mode": mode})
    if mode == "abort":
        assert call.result(timeout=10).json()["meta_info"]["finish_reason"]["type"] == end
    http.post("/continue_generation", json={})
    assert call.result(timeout=10).json()["meta_info"]["finish_reason"]["type"] == end


def test_paused_looks_hung_to_a_health_probe_and_recovers(http: httpx.Client) -> None:
    http.post("/pause_generation", json={})
    try:
        assert http.get("/health").status_code == 503
        assert http.get("/ping").status_code == 503
    finally:
        http.post("/continue_generation", json={})
    assert http.get("/health").status_code == 200
    assert http.get("/ping").status_code == 200


def test_the_cache_is_flushed_when_idle(http: httpx.Client) -> None:
    response = http.post("/flush_cache")
    assert response.status_code == 200
    assert "Cache flushed" in response.text


@pytest.mark.usefixtures("slow")
def test_the_cache_is_not_flushed_when_busy_unless_there_is_time(
    http: httpx.Client, pool: ThreadPoolExecutor
) -> None:
    call = pool.submit(generate, http)
    until(lambda: running_requests(http) > 0, "the request to run")
    assert http.post("/flush_cache").status_code == 400
    assert http.post("/flush_cache?timeout=10").status_code == 200
    assert call.result(timeout=10).status_code == 200


@pytest.mark.parametrize("path", ["/release_memory_occupation", "/resume_memory_occupation"])
def test_memory_calls_answer_null_and_change_nothing(http: httpx.Client, path: str) -> None:
    assert http.post(path, json={}).json() is None
    assert generate(http).status_code == 200


# Weights


@pytest.fixture
def as_before(http: httpx.Client) -> Iterator[dict[str, Any]]:
    """Puts path and version back."""
    info = http.get("/model_info").json()
    yield info
    body = {"model_path": info["model_path"], "weight_version": info["weight_version"]}
    assert http.post("/update_weights_from_disk", json=body).json()["success"] is True


def test_weights_from_disk_change_path_name_and_version(
    http: httpx.Client, as_before: dict[str, Any]
) -> None:
    body = {"model_path": as_before["model_path"], "weight_version": "7"}
    answer = http.post("/update_weights_from_disk", json=body)
    assert answer.status_code == 200
    assert answer.json()["success"] is True
    assert answer.json()["num_paused_requests"] == 0
    info = http.get("/model_info").json()
    assert (info["weight_version"], info["served_model_name"]) == ("7", body["model_path"])
    assert generate(http).json()["meta_info"]["weight_version"] == "7"


def test_weights_without_a_version_keep_the_old_one(http: httpx.Client, as_before: dict[str, Any]) -> None:
    assert (
        http.post("/update_weights_from_disk", json={"model_path": as_before["model_path"]}).status_code
        == 200
    )
    assert http.get("/model_info").json()["weight_version"] == as_before["weight_version"]


def test_a_bad_weight_path_is_refused_and_the_server_serves_on(http: httpx.Client, tmp_path: Path) -> None:
    before = http.get("/model_info").json()
    body = {"model_path": str(tmp_path / "nothing"), "weight_version": "8"}
    answer = http.post("/update_weights_from_disk", json=body)
    assert (answer.status_code, answer.json()["success"]) == (400, False)
    assert http.get("/model_info").json() == before
    assert generate(http).status_code == 200


@pytest.mark.usefixtures("slow")
def test_no_request_straddles_a_weight_update(
    http: httpx.Client, pool: ThreadPoolExecutor, as_before: dict[str, Any]
) -> None:
    early = pool.submit(generate, http)
    until(lambda: running_requests(http) > 0, "the request to run")
    body = {"model_path": as_before["model_path"], "weight_version": "9"}
    update = pool.submit(http.post, "/update_weights_from_disk", json=body)
    time.sleep(0.1)
    late = pool.submit(generate, http)
    assert early.result(timeout=10).json()["meta_info"]["weight_version"] == as_before["weight_version"]
    assert update.result(timeout=10).json()["success"] is True
    assert late.result(timeout=10).json()["meta_info"]["weight_version"] == "9"


def test_a_checksum_is_of_the_weights_and_not_of_their_name(
    http: httpx.Client, as_before: dict[str, Any]
) -> None:
    """The same weights under another version have the same checksum; see also the test of other weights."""
    first = http.post("/weights_checker", json={"action": "checksum"}).json()
    assert first["success"] is True
    assert len(first["ranks"]) == 1
    assert {"tp_rank", "tp_size", "pp_size", "dp_size"} <= set(first["ranks"][0]["parallelism_info"][0])
    body = {"model_path": as_before["model_path"], "weight_version": "11"}
    assert http.post("/update_weights_from_disk", json=body).json()["success"] is True
    again = http.get("/weights_checker").json()
    assert again["per_engine_checksum"] == first["per_engine_checksum"]
    assert len(again["per_engine_checksum"]) == 64


def test_other_weights_have_another_checksum(
    http: httpx.Client, as_before: dict[str, Any], tmp_path: Path
) -> None:
    first = http.get("/weights_checker").json()["per_engine_checksum"]
    write_base_model(tmp_path / "other", seed=7)
    body = {"model_path": str(tmp_path / "other"), "weight_version": "12"}
    assert http.post("/update_weights_from_disk", json=body).json()["success"] is True
    assert http.get("/weights_checker").json()["per_engine_checksum"] != first


def test_outside_a_group_distributed_weights_are_refused(http: httpx.Client) -> None:
    body = {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[64]], "group_name": "nobody"}
    answer = http.post("/update_weights_from_distributed", json=body | {"weight_version": "10"})
    assert answer.status_code == 400
    assert answer.json()["success"] is False
    assert "update" in answer.json()["message"]
    assert http.get("/model_info").json()["weight_version"] != "10"


def test_many_clients_at_once_all_get_their_own_answer(http: httpx.Client, pool: ThreadPoolExecutor) -> None:
    gate = threading.Barrier(8)

    def one(number: int) -> list[int]:
        gate.wait(timeout=10)
        ids: list[int] = generate(http, input_ids=[10, number, 11]).json()["output_ids"]
        return ids

    calls: list[Future[list[int]]] = [pool.submit(one, number) for number in range(8)]
    together = [call.result(timeout=10) for call in calls]
    assert together == [
        generate(http, input_ids=[10, number, 11]).json()["output_ids"] for number in range(8)
    ]
