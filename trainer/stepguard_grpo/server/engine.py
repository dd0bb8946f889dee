"""
Continuous batching: requests come and go, `advance` gives every running one its next token.

Promise: the engine is a value machine. It does no I/O, never waits, and what a request yields does not depend
on its neighbours. Weights change only between two tokens; callers that want no request to straddle a change
drain first.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stepguard_grpo.server.drawing import draw
from stepguard_grpo.server.llama import Llama
from stepguard_grpo.server.memory import RequestMemory
from stepguard_grpo.server.sampling import Sampling

Finish = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Running:
    """A request in the engine, and what it has got so far."""

    rid: str
    input_ids: list[int]
    sampling: Sampling
    seed: int
    output_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: Finish | None = None


class Engine:
    """Queue, running batch and model."""

    def __init__(self, model: Llama, *, max_running: int, memory: RequestMemory | None = None) -> None:
        self.model = model
        self._memory = RequestMemory() if memory is None else memory
        self.running: list[Running] = []
        self.waiting: deque[Running] = deque()
        self._max_running = max_running
        self.retracted_total = 0
        self.generated_total = 0

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self.running or self.waiting)

    @property
    def used_tokens(self) -> int:
        """Tokens held by running requests."""
        return sum(len(request.input_ids) + len(request.output_ids) for request in self.running)

    def add(self, request: Running) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def abort(self, rid: str | None) -> list[Running]:
        """Take one request out, or all for None, with what they have so far."""
        everyone = [*self.running, *self.waiting]
        gone = [request for request in everyone if rid is None or request.rid == rid]
        for request in gone:
            request.finish = {"type": "abort", "message": "Abort in waiting queue or during generation"}
        self.running = [request for request in self.running if request.finish is None]
        self.waiting = deque(request for request in self.waiting if request.finish is None)
        return gone

    def retract(self) -> int:
        """Put what runs back into the queue; it goes on from where it was."""
        count = len(self.running)
        self.waiting.extendleft(reversed(self.running))
        self.running = []
        self.retracted_total += count
        return count

    def advance(self) -> list[Running]:
        """
        One forward pass: a token for every running request. Returns those that are finished by it.

        IndexError for a token id outside the vocabulary: as in the real server, the whole engine is lost
        then. OutOfMemoryError likewise.
        """
        while self.waiting and len(self.running) < self._max_running:
            self.running.append(self.waiting.popleft())
        self._memory.hold_for([request.rid for request in self.running])
        by_length: dict[int, list[Running]] = {}
        for request in self.running:
            by_length.setdefault(len(request.input_ids) + len(request.output_ids), []).append(request)
        for group in by_length.values():
            self._advance_group(group)
        finished = [request for request in self.running if request.finish is not None]
        self.running = [request for request in self.running if request.finish is None]
        if not self.running:
            self._memory.hold_for([])
        return finished

    def _advance_group(self, group: list[Running]) -> None:
        tokens = np.array([request.input_ids + request.output_ids for request in group], dtype=np.int64)
        for request, row in zip(group, self.model.logits(tokens), strict=True):
            if request.sampling.max_new_tokens == 0:
                request.finish = {"type": "length", "length": 0}
                continue
            position = len(request.output_ids)
            token, log_prob = draw(row, request.sampling, seed=request.seed, position=position)
            request.output_ids.append(token)
            request.log_probs.append(log_prob)
            self.generated_total += 1
            request.finish = self._finish(request, token)

    def _finish(self, request: Running, token: int) -> Finish | None:
        made, sampling = len(request.output_ids), request.sampling
        eos = None if sampling.ignore_eos else self.model.shape.eos_token_id
        if made >= sampling.min_new_tokens and (token == eos or token in sampling.stop_token_ids):
            return {"type": "stop", "matched": token}
        if made >= sampling.max_new_tokens:
            return {"type": "length", "length": sampling.max_new_tokens}
        return None
