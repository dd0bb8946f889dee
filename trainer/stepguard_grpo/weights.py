"""
Weights to the server, in two ways: over disk, and over a group whose handshake dies with the server.

Promise: `push` returns when the server says that it serves the version, and raises `WeightPushError`
otherwise, within the time limit. `rebuild` is for a server that was started again; over disk there is nothing
to rebuild.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import httpx

from stepguard_grpo.model import save_policy

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

KEEP_VERSIONS = 2
GROUP_TIMEOUT_S = 10.0
GROUP_NAME = "weight_update_group"
POLL_S = 0.1


class WeightPushError(Exception):
    """The server does not serve the new weights."""


class WeightSync(Protocol):
    """One way to bring weights to the server."""

    def push(self, policy: LlamaForCausalLM, version: str) -> None:
        """Make the server serve these weights under this version."""
        ...

    def rebuild(self) -> None:
        """Make the connection anew, after the server was."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...


class ServerClient:
    """
    The few control calls that a weight sync needs; synchronous, because orders also arrive in synchronous
    code.
    """

    def __init__(self, server_url: str, *, timeout_s: float = 10.0) -> None:
        # Proxies of the environment have no business between a trainer and its server.
        self._http = httpx.Client(base_url=server_url, timeout=timeout_s, trust_env=False)

    def post(self, path: str, body: dict[str, Any]) -> None:
        """POST; WeightPushError unless the server says success."""
        try:
            response = self._http.post(path, json=body)
            answer = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise WeightPushError(f"{path}: {type(error).__name__}: {error}") from error
        if response.status_code != 200 or not (isinstance(answer, dict) and answer.get("success") is True):
            raise WeightPushError(f"{path}: HTTP {response.status_code}: {response.text[:200]}")

    def wait_until_up(self, timeout_s: float) -> None:
        """Wait until the server answers `/model_info`; WeightPushError when it does not."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if self._http.get("/model_info", timeout=2.0).status_code == 200:
                    return
            if time.monotonic() >= deadline:
                raise WeightPushError(f"{self._http.base_url}: no server answered within {timeout_s:g} s")
            time.sleep(POLL_S)

    def close(self) -> None:
        """Let go of connections."""
        self._http.close()


class DiskSync:
    """
    `<root>/<version>/`, written beside and renamed, then `/update_weights_from_disk`. The newest two are
    kept.
    """

    def __init__(self, client: ServerClient, root: Path) -> None:
        self._client = client
        self._root = root

    def push(self, policy: LlamaForCausalLM, version: str) -> None:
        """Write, then tell the server."""
        path = self._write(policy, version)
        body = {"model_path": str(path), "weight_version": version}
        self._client.post("/update_weights_from_disk", body)

    def rebuild(self) -> None:
        """Nothing: a directory outlives any server."""

    def close(self) -> None:
        """Let go of connections."""
        self._client.close()

    def _write(self, policy: LlamaForCausalLM, version: str) -> Path:
        path, fresh, old = (
            self._root / version,
            self._root / f".{version}.new",
            self._root / f".{version}.old",
        )
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir(parents=True)
        save_policy(policy, fresh)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        kept = [entry for entry in self._root.iterdir() if not entry.name.startswith(".")]
        for entry in sorted(kept, key=lambda entry: entry.stat().st_mtime_ns)[:-KEEP_VERSIONS]:
            shutil.rmtree(entry, ignore_errors=True)
        return path


class GroupSync:
    """A connection made by `/init_weights_update_group`; tensors go over it, as over an NCCL group."""

    def __init__(self, client: ServerClient) -> None:
        self._client = client
        self._connection: socket.socket | None = None

    def push(self, policy: LlamaForCausalLM, version: str) -> None:
        """Announce the tensors and send them; outside the group this fails, until `rebuild`."""
        connection = self._connection
        if connection is None:
            raise WeightPushError("the weight-update group is gone; it must be built anew")
        tensors = {name: value.detach().contiguous().numpy() for name, value in policy.state_dict().items()}
        data = b"".join(value.astype("<f4").tobytes() for value in tensors.values())
        # The server reads while it handles the call, so the two must overlap.
        sender = threading.Thread(target=_send, args=(connection, data), daemon=True)
        sender.start()
        body = {
            "group_name": GROUP_NAME,
            "names": list(tensors),
            "dtypes": ["float32"] * len(tensors),
            "shapes": [list(value.shape) for value in tensors.values()],
            "weight_version": version,
        }
        try:
            self._client.post("/update_weights_from_distributed", body)
        except WeightPushError:
            self._drop()
            raise
        finally:
            sender.join(timeout=GROUP_TIMEOUT_S)

    def rebuild(self) -> None:
        """Make a new group with whatever server is there now."""
        self._drop()
        with contextlib.suppress(WeightPushError):  # a restarted server has none to leave
            self._client.post("/destroy_weights_update_group", {"group_name": GROUP_NAME})
        with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
            listener.settimeout(GROUP_TIMEOUT_S)
            body = {
                "master_address": "127.0.0.1",
                "master_port": listener.getsockname()[1],
                "rank_offset": 1,
                "world_size": 2,
                "group_name": GROUP_NAME,
                "backend": "nccl",
            }
            self._client.post("/init_weights_update_group", body)
            try:
                self._connection, _ = listener.accept()
            except OSError as error:
                raise WeightPushError(f"the server did not join the weight-update group: {error}") from error
        self._connection.settimeout(GROUP_TIMEOUT_S)

    def close(self) -> None:
        """Let go of connections."""
        self._drop()
        self._client.close()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _send(connection: socket.socket, data: bytes) -> None:
    # Whether the tensors arrived is what the call's answer says; a broken connection shows there.
    with contextlib.suppress(OSError):
        connection.sendall(data)
