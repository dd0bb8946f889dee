"""The engine: what it computes is Llama, and a request's tokens do not depend on its neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepguard_grpo.model import load_policy
from stepguard_grpo.server.drawing import draw
from stepguard_grpo.server.engine import Engine, Running
from stepguard_grpo.server.llama import Llama, load_weights
from stepguard_grpo.server.memory import OutOfMemoryError, PretendedGpu, RequestMemory
from stepguard_grpo.server.sampling import Sampling, UnknownKeyError, parse_sampling
from stepguard_grpo.server.shape import read_shape


@pytest.fixture(scope="module")
def llama(base_model: Path) -> Llama:
    return Llama(read_shape(base_model), load_weights(base_model))


def request(rid: str, prompt: list[int], *, seed: int = 1, **params: Any) -> Running:
    sampling = Sampling(**({"max_new_tokens": 4, "ignore_eos": True} | params))
    return Running(rid=rid, input_ids=prompt, sampling=sampling, seed=seed)


def finish(engine: Engine) -> dict[str, Running]:
    done = {}
    while engine.busy:
        done |= {one.rid: one for one in engine.advance()}
    return done


def test_logits_are_those_of_transformers(llama: Llama, base_model: Path) -> None:
    import torch

    tokens = np.random.default_rng(0).integers(0, llama.shape.vocab_size, (8, 10))
    with torch.no_grad():
        wanted = load_policy(base_model)(torch.tensor(tokens)).logits[:, -1].numpy()
    np.testing.assert_allclose(llama.logits(tokens), wanted, atol=5e-6)


def test_a_batch_gives_each_row_the_bits_it_gets_alone(llama: Llama) -> None:
    tokens = np.random.default_rng(1).integers(0, llama.shape.vocab_size, (33, 9))
    together = llama.logits(tokens)
    alone = np.concatenate([llama.logits(tokens[row : row + 1]) for row in range(len(tokens))])
    assert (together == alone).all()


def test_tokens_depend_on_the_seed_and_not_on_the_neighbours(llama: Llama) -> None:
    prompts = [[10, number % 10, 11, *[3] * (number % 3)] for number in range(12)]
    crowd, narrow = Engine(llama, max_running=12), Engine(llama, max_running=2)
    for engine in (crowd, narrow):
        for number, prompt in enumerate(prompts):
            engine.add(request(str(number), prompt, seed=number))
    together, queued = finish(crowd), finish(narrow)
    assert {rid: one.output_ids for rid, one in together.items()} == {
        rid: one.output_ids for rid, one in queued.items()
    }
    assert {rid: one.log_probs for rid, one in together.items()} == {
        rid: one.log_probs for rid, one in queued.items()
    }


def test_retracted_requests_go_on_where_they_were(llama: Llama) -> None:
    straight, retracted = Engine(llama, max_running=4), Engine(llama, max_running=4)
    for engine in (straight, retracted):
        for number in range(3):
            engine.add(request(str(number), [10, number, 11], seed=number))
    retracted.advance()
    assert retracted.retract() == 3
    assert [one.rid for one in retracted.waiting] == ["0", "1", "2"]
    wanted, got = finish(straight), finish(retracted)
    assert [wanted[rid].output_ids for rid in "012"] == [got[rid].output_ids for rid in "012"]


def test_abort_takes_running_and_waiting_alike(llama: Llama) -> None:
    engine = Engine(llama, max_running=1)
    engine.add(request("runs", [10, 1]))
    engine.add(request("waits", [10, 2]))
    engine.advance()
    gone = engine.abort(None)
    assert [(one.rid, len(one.output_ids)) for one in gone] == [("runs", 1), ("waits", 0)]
    assert all(one.finish is not None and one.finish["type"] == "abort" for one in gone)
    assert not engine.busy


def test_end_of_sequence_and_stop_tokens_end_a_request(llama: Llama) -> None:
    engine = Engine(llama, max_running=4)
    everything = tuple(range(llama.shape.vocab_size))
    engine.add(request("stop", [10, 1], stop_token_ids=everything))
    engine.add(request("later", [10, 1], stop_token_ids=everything, min_new_tokens=3))
    done = finish(engine)
    assert done["stop"].finish == {"type": "stop", "matched": done["stop"].output_ids[-1]}
    assert (len(done["stop"].output_ids), len(done["later"].output_ids)) == (1, 3)


@pytest.mark.parametrize("bad", [16, 99_999, -1])
def test_an_id_outside_the_vocabulary_is_fatal(llama: Llama, bad: int) -> None:
    engine = Engine(llama, max_running=4)
    engine.add(request("poison", [10, bad]))
    with pytest.raises(IndexError):
        engine.advance()


def test_weights_are_taken_as_a_whole_or_not_at_all(base_model: Path) -> None:
    llama = Llama(read_shape(base_model), load_weights(base_model))
    tokens = np.array([[10, 1, 2, 11]])
    before = llama.logits(tokens)
    weights = load_weights(base_model)
    doubled = {"model.norm.weight": weights["model.norm.weight"] * 2}
    with pytest.raises(ValueError, match="shape"):
        llama.replace(doubled | {"lm_head.weight": np.zeros((3, 3), dtype=np.float32)})
    assert (llama.logits(tokens) == before).all()
    llama.replace(doubled)
    assert not (llama.logits(tokens) == before).all()


def test_missing_weights_are_named(base_model: Path) -> None:
    weights = load_weights(base_model)
    del weights["model.norm.weight"]
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        Llama(read_shape(base_model), weights)


@given(seed=st.integers(0, 2**31), position=st.integers(0, 100))
def test_greedy_draws_the_most_likely_whatever_the_seed(seed: int, position: int) -> None:
    logits = np.array([0.0, 3.0, 1.0], dtype=np.float32)
    token, log_prob = draw(logits, Sampling(temperature=0.0), seed=seed, position=position)
    assert token == 1
    assert log_prob == pytest.approx(3.0 - np.log(np.exp([0.0, 3.0, 1.0]).sum()))


@given(seed=st.integers(0, 2**31))
def test_top_k_and_top_p_and_min_p_cut_the_tail(seed: int) -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    assert draw(logits, Sampling(top_k=1), seed=seed, position=0)[0] == 0
    assert draw(logits, Sampling(top_p=0.6), seed=seed, position=0)[0] in (0, 1)
    assert draw(logits, Sampling(min_p=0.2), seed=seed, position=0)[0] in (0, 1, 2)


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    drawn = [draw(logits, Sampling(), seed=seed, position=0)[0] for seed in range(4000)]
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.03)


def test_sampling_keys_are_known_or_refused() -> None:
    assert parse_sampling({"temperature": 0.5, "skip_special_tokens": True}).temperature == 0.5
    assert parse_sampling({"frequency_penalty": 0.0, "stop": None}) == Sampling()
    with pytest.raises(UnknownKeyError, match="max_tokens"):
        parse_sampling({"max_tokens": 3})
    with pytest.raises(ValueError, match="frequency_penalty is not supported"):
        parse_sampling({"frequency_penalty": 0.5})
    for bad in ({"temperature": "hot"}, {"temperature": float("nan")}, {"n": 0}, {"top_k": 0}, {"n": True}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            parse_sampling(bad)


def test_a_pretended_gpu_is_full_of_too_many_requests_and_holds_fewer(llama: Llama, tmp_path: Path) -> None:
    """The sum of SGLang's: a static share, and what each running request takes beside it."""
    file = tmp_path / "gpu"
    memory = RequestMemory(10, PretendedGpu(file=file, mem_fraction_static=0.7))

    def ask(max_running: int) -> dict[str, Running]:
        engine = Engine(llama, max_running=max_running, memory=memory)
        for number in range(4):
            engine.add(request(str(number), [10, 1, 11], seed=number))
        return finish(engine)

    file.write_text("100 0")
    with pytest.raises(OutOfMemoryError, match=r"CUDA out of memory\. Tried to allocate"):
        ask(4)
    assert len(ask(3)) == 4
    file.write_text("100 10")
    with pytest.raises(OutOfMemoryError, match="CUDA out of memory"):
        ask(3)
    assert len(ask(2)) == 4


def test_what_a_running_request_takes_of_the_host_is_real_and_goes_back(llama: Llama) -> None:
    """Pages that a cgroup counts, from the first pass to the last."""
    each, count = 8 << 20, 4
    engine = Engine(llama, max_running=count, memory=RequestMemory(each))
    for number in range(count):
        engine.add(request(str(number), [10, 1, 11], seed=number))
    before = anonymous_bytes()
    engine.advance()
    assert anonymous_bytes() - before > (count - 1) * each
    finish(engine)
    assert anonymous_bytes() - before < each


def anonymous_bytes() -> int:
    rows = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(dict(rows)["RssAnon"].split()[0]) * 1024
