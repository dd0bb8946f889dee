"""
The scheduler process: owns the model, batches requests, answers control calls one after another.

It speaks `wire` over an inherited socket and dies with its parent (PR_SET_PDEATHSIG). An exception in it is
fatal for the whole server, as it is in SGLang: it is printed, the parent gets SIGQUIT, the process ends. It
is single-threaded on purpose: stopped, or stuck in a forward pass, it answers nothing.
"""

from __future__ import annotations

import ctypes
import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from stepguard_grpo.server.engine import Engine, Running
from stepguard_grpo.server.groups import GroupError, Groups
from stepguard_grpo.server.llama import Llama, load_weights
from stepguard_grpo.server.memory import PretendedGpu, RequestMemory
from stepguard_grpo.server.sampling import Sampling
from stepguard_grpo.server.shape import read_shape
from stepguard_grpo.server.wire import Inbox, Message, pack

SNAPSHOT_S = 0.25
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15

log = logging.getLogger("stepguard_grpo.server")


class Scheduler:
    """The loop around an engine. `run` ends with the message `shutdown` or the parent's end closed."""

    def __init__(self, connection: socket.socket, engine: Engine, weight_version: str) -> None:
        self._connection = connection
        self._engine = engine
        self._weight_version = weight_version
        self._inbox = Inbox()
        self._groups = Groups()
        self._paused = False
        self._updates: list[Message] = []  # weight updates that wait for running requests to end
        self._held: list[Message] = []  # requests that came after such an update
        self._sleep_s = 0.0
        self._stop = False
        self._last_snapshot = 0.0
        self._prompt_tokens = 0
        self._throughput = (time.monotonic(), 0, 0.0)  # since, tokens then, last rate

    def run(self) -> None:
        """Serve until told to stop."""
        while not self._stop:
            work = (self._engine.busy and not self._paused) or bool(self._updates)
            readable, _, _ = select.select([self._connection], [], [], 0.0 if work else SNAPSHOT_S)
            if readable:
                data = self._connection.recv(1 << 20)
                if not data:
                    return
                for message in self._inbox.feed(data):
                    self._handle(message)
            if self._updates and (self._paused or not self._engine.busy):
                self._apply_updates()
            if self._engine.busy and not self._paused:
                self._forward()
            self._snapshot(time.monotonic())

    def _send(self, message: Message) -> None:
        self._connection.sendall(pack(message))

    def _handle(self, message: Message) -> None:
        operation = message["op"]
        if operation == "generate":
            if self._updates:
                self._held.append(message)
            else:
                self._admit(message)
        elif operation == "abort":
            self._held = [held for held in self._held if not self._abort_held(held, message["rid"])]
            self._finish(self._engine.abort(message["rid"]))
        elif operation == "shutdown":
            self._stop = True
        elif operation in ("update_from_disk", "update_from_distributed"):
            self._updates.append(message)
        else:
            self._send({"kind": "reply", "id": message["id"], **self._control(operation, message)})

    def _admit(self, message: Message) -> None:
        self._prompt_tokens += len(message["input_ids"])
        seed = message["sampling"]["sampling_seed"]
        self._engine.add(
            Running(
                rid=message["rid"],
                input_ids=message["input_ids"],
                sampling=Sampling(**message["sampling"]),
                seed=int.from_bytes(os.urandom(6), "little") if seed is None else seed,
            )
        )

    def _abort_held(self, held: Message, rid: str | None) -> bool:
        if rid is not None and held["rid"] != rid:
            return False
        self._send({**_EMPTY, "rid": held["rid"], "weight_version": self._weight_version})
        return True

    def _control(self, operation: str, message: Message) -> dict[str, Any]:
        if operation == "pause":
            if message["mode"] == "abort":
                self._finish(self._engine.abort(None))
            elif message["mode"] == "retract":
                self._engine.retract()
            self._last_snapshot = 0.0  # the last one before the pause shows what the pause did
            self._snapshot(time.monotonic())
            self._paused = True
        elif operation == "continue":
            self._paused = False
        elif operation == "flush":
            return {"ok": not self._engine.busy}
        elif operation == "slow_down":
            self._sleep_s = message["forward_sleep_time"] or 0.0
        elif operation == "info":
            return {"internal_states": [{"last_gen_throughput": self._throughput[2], "paused": self._paused}]}
        elif operation == "checksum":
            return {"checksums": self._engine.model.checksums()}
        elif operation == "join_group":
            return _outcome(
                lambda: self._groups.join(message["group_name"], message["host"], message["port"]),
                "Succeeded to initialize custom process group.",
            )
        elif operation == "leave_group":
            return _outcome(
                lambda: self._groups.leave(message["group_name"]),
                "Succeeded to destroy custom process group.",
            )
        elif operation != "memory":
            raise ValueError(f"{operation}: no such operation")
        return {}

    def _apply_updates(self) -> None:
        updates, self._updates = self._updates, []
        for message in updates:
            result = _outcome(
                lambda message=message: self._update(message), "Succeeded to update model weights."
            )
            if result["success"] and message["weight_version"] is not None:
                self._weight_version = message["weight_version"]
            self._send(
                {"kind": "reply", "id": message["id"], **result, "weight_version": self._weight_version}
            )
        held, self._held = self._held, []
        for message in held:
            self._admit(message)

    def _update(self, message: Message) -> None:
        if message["op"] == "update_from_disk":
            path = Path(message["model_path"])
            shape = read_shape(path)
            self._engine.model = Llama(shape, load_weights(path))
        else:
            tensors = self._groups.receive(
                message["group_name"], message["names"], message["dtypes"], message["shapes"]
            )
            self._engine.model.replace(tensors)

    def _forward(self) -> None:
        if self._sleep_s:
            log.info("Scheduler.run_batch sleep %.2fs", self._sleep_s)
            time.sleep(self._sleep_s)
        self._finish(self._engine.advance())

    def _finish(self, requests: list[Running]) -> None:
        for request in requests:
            self._send(
                {
                    "kind": "done",
                    "rid": request.rid,
                    "output_ids": request.output_ids,
                    "log_probs": request.log_probs,
                    "finish": request.finish,
                    "weight_version": self._weight_version,
                }
            )

    def _snapshot(self, now: float) -> None:
        if self._paused or now - self._last_snapshot < SNAPSHOT_S:
            return
        engine = self._engine
        since, tokens, rate = self._throughput
        if now - since >= 1.0:
            rate = (engine.generated_total - tokens) / (now - since)
            self._throughput = (now, engine.generated_total, rate)
        self._last_snapshot = now
        self._send(
            {
                "kind": "load",
                "timestamp": time.time(),
                "num_running_reqs": len(engine.running),
                "num_waiting_reqs": len(engine.waiting) + len(self._held),
                "num_used_tokens": engine.used_tokens,
                "num_retracted_reqs": engine.retracted_total,
                "prompt_tokens_total": self._prompt_tokens,
                "generation_tokens_total": engine.generated_total,
                "gen_throughput": rate,
            }
        )


_EMPTY: Message = {
    "kind": "done",
    "output_ids": [],
    "log_probs": [],
    "finish": {"type": "abort", "message": "Aborted"},
}


def _outcome(act: Any, success: str) -> dict[str, Any]:
    """What the client is told of an update or a group call: only these errors are the caller's."""
    try:
        act()
    except (GroupError, OSError, KeyError, ValueError, SafetensorError) as error:
        return {"success": False, "message": f"{type(error).__name__}: {error}"}
    return {"success": True, "message": success}


def _die_with(parent_pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_NAME, b"stepguard_grpo:", 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def main(arguments: list[str]) -> None:
    """
    The process; started by the parent only.

    `TITLE PARENT_PID SOCKET_FD MODEL_PATH WEIGHT_VERSION MAX_RUNNING REQUEST_BYTES GPU_FILE MEM_FRACTION`
    """
    _, parent, descriptor, model_path, weight_version, max_running, request_bytes, gpu, share = arguments
    parent_pid = int(parent)
    _die_with(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    logging.basicConfig(
        level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S", stream=sys.stderr
    )
    try:
        path = Path(model_path)
        shape = read_shape(path)
        pretended = PretendedGpu(file=Path(gpu), mem_fraction_static=float(share)) if gpu else None
        memory = RequestMemory(int(request_bytes), pretended)
        engine = Engine(Llama(shape, load_weights(path)), max_running=int(max_running), memory=memory)
        with socket.socket(fileno=int(descriptor)) as connection:
            connection.sendall(pack({"kind": "ready", "context_len": shape.context_len}))
            Scheduler(connection, engine, weight_version).run()
    except BaseException:  # noqa: BLE001 - the border of the process: whatever it was, the server goes down with it
        log.error("Scheduler hit an exception: %s", traceback.format_exc())
        os.kill(parent_pid, signal.SIGQUIT)
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
