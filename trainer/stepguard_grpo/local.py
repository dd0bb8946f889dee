"""
The server's engine inside the trainer's own process: no HTTP, no second process, the same tokens.

For tests, and to see that a run over HTTP is reproduced exactly. It fails only when told to.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from stepguard_grpo.rollout import Rollout, RolloutError, request_body, rollout_of
from stepguard_grpo.server.engine import Engine, Running
from stepguard_grpo.server.llama import Llama, load_weights
from stepguard_grpo.server.sampling import parse_sampling
from stepguard_grpo.server.shape import read_shape
from stepguard_grpo.task import Request
from stepguard_grpo.weights import WeightPushError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class LocalServer:
    """Sampler and weight sync in one; `down` makes both fail, `frozen` ignores pushes, says success."""

    def __init__(self, base_model: Path) -> None:
        self._base = load_weights(base_model)
        self._engine = Engine(Llama(read_shape(base_model), self._base), max_running=64)
        self.weight_version = "default"
        self.down = False
        self.frozen = False
        self.pushes: list[str] = []
        self.rebuilds = 0

    async def __call__(self, request: Request) -> Rollout:
        """Roll out one trajectory."""
        if self.down:
            raise RolloutError("the local server is down")
        body = request_body(request)
        sampling = parse_sampling(body["sampling_params"])
        running = Running(
            rid=str(request.index), input_ids=body["input_ids"], sampling=sampling, seed=request.sampling_seed
        )
        self._engine.add(running)
        await asyncio.sleep(0)  # the others of the batch join; whoever comes back first works for all
        while running.finish is None:
            self._engine.advance()
        pairs = zip(running.log_probs, running.output_ids, strict=True)
        meta = {
            "finish_reason": running.finish,
            "weight_version": self.weight_version,
            "output_token_logprobs": [[log_prob, token, None] for log_prob, token in pairs],
        }
        return rollout_of(request, {"output_ids": running.output_ids, "meta_info": meta})

    def push(self, policy: LlamaForCausalLM, version: str) -> None:
        """Take the weights."""
        if self.down:
            raise WeightPushError("the local server is down")
        if self.frozen:
            return
        weights = {name: value.detach().numpy().copy() for name, value in policy.state_dict().items()}
        self._engine.model.replace(weights)
        self.weight_version = version
        self.pushes.append(version)

    def restart(self) -> None:
        """Come back up as a new server does: with the base model."""
        self._engine.model.replace(self._base)
        self.weight_version = "default"
        self.down = False

    def rebuild(self) -> None:
        """There is no connection to rebuild."""
        self.rebuilds += 1

    async def aclose(self) -> None:
        """Nothing is open."""

    def close(self) -> None:
        """Nothing is open."""
