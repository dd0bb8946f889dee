"""
What every back-end promises, put to each of them by the same tests.

The programs that own servers elsewhere are small real ones, written here and run as real processes: a
`systemctl`, a `docker` that talks as docker 28 does, an HTTP hook; Ray is a real cluster. What they own is a
real process that listens on a port. The real systemd has tests of its own: tests/real_systemd.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from daemon_parts.conftest import until
from daemon_parts.ray_engine import Engine
from grpo.server_process import free_port
from stepguardd import proc
from stepguardd.config import LaunchSettings, ServerSettings
from stepguardd.effects.backends.actor import RayBackend
from stepguardd.effects.backends.contract import Backend, overlaid, value_of
from stepguardd.effects.backends.docker import DockerBackend
from stepguardd.effects.backends.http import HookBackend
from stepguardd.effects.backends.none import ObservedBackend
from stepguardd.effects.backends.process import ProcessBackend
from stepguardd.effects.backends.systemd import SystemdBackend
from stepguardd.effects.backends.trainer import TrainerBackend
from stepguardd.effects.trainer import Resume, SystemdTrainer

SERVER = """
import json, os, socket, sys, time
folder, port = sys.argv[1], int(sys.argv[2])
with open(f"{folder}/starts", "a") as starts:
    starts.write(json.dumps({"pid": os.getpid(), "arguments": sys.argv[3:]}) + "\\n")
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("127.0.0.1", port)); s.listen(); time.sleep(1000)
"""

SYSTEMCTL = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
case "$1" in
  show) cat {folder}/pid 2>/dev/null || echo 0 ;;
  cat) echo "# /etc/systemd/system/sglang.service"; cat {folder}/unit
       [ -e {drop} ] && {{ echo "# {drop}"; cat {drop}; }}; exit 0 ;;
  start) [ -e {folder}/pid ] && kill -0 "$(cat {folder}/pid)" 2>/dev/null && exit 0
         line=$(cat {folder}/unit {drop} 2>/dev/null | grep ^ExecStart= | tail -1)
         line=${{line//%t//{folder}/run}} line=${{line//%i/one}}
         setsid ${{line#ExecStart=}} >/dev/null 2>&1 </dev/null & echo $! > {folder}/pid ;;
  stop) kill -9 "$(cat {folder}/pid 2>/dev/null)" 2>/dev/null; rm -f {folder}/pid; exit 0 ;;
  *) exit 0 ;;
esac
"""

DOCKER = """#!{python}
import json, os, signal, subprocess, sys, time
from datetime import datetime, timezone
state, words = "{folder}/container", sys.argv[1:]
def load():
    try:
        return json.load(open(state))
    except FileNotFoundError:
        sys.exit("Error response from daemon: No such container: " + words[-1])
def alive(pid):
    try:
        return open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
def spawn(command):
    child = subprocess.Popen(command, start_new_session=True, stdin=-3, stdout=-3, stderr=-3)
    return {{"Pid": child.pid, "StartedAt": datetime.now(timezone.utc).isoformat()}}
def save(box):
    json.dump(box, open(state + ".new", "w")); os.replace(state + ".new", state)
verb = words[0]
if verb == "inspect":
    box = load()
    box["State"]["Running"] = alive(box["State"]["Pid"])
    print(json.dumps([box]))
elif verb == "run":
    if os.path.exists(state):
        sys.exit("Error response from daemon: Conflict. The container name is already in use")
    labels, at = {{}}, 1
    while words[at].startswith("-"):
        if words[at] == "--label":
            key, _, value = words[at + 1].partition("=")
            labels[key] = value
        at += 1 if words[at] == "--detach" else 2
    command = words[at + 1:]
    save({{"State": spawn(command), "Config": {{"Labels": labels}}, "Command": command}})
elif verb == "start":
    box = load()
    if not alive(box["State"]["Pid"]):
        box["State"] = spawn(box["Command"])
        save(box)
elif verb in ("stop", "rm"):
    box = load()
    if alive(box["State"]["Pid"]):
        os.kill(box["State"]["Pid"], signal.SIGKILL)
        while alive(box["State"]["Pid"]):
            time.sleep(0.01)
    if verb == "rm":
        os.remove(state)
else:
    sys.exit("unknown command")
"""


class Rig:
    """
    One back-end over its world, and what the world may do by itself.

    `makes` is whether a start by this back-end makes the server, rather than waits for somebody to; `changes`
    whether it can give it other arguments.
    """

    makes = True
    changes = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.appeared: list[subprocess.Popen[bytes]] = []
        (folder / "server.py").write_text(SERVER)
        self.command = [sys.executable, str(folder / "server.py"), str(folder), str(self.port)]
        self.command += ["--mem-fraction-static", "0.8"]
        self.build()

    def build(self) -> None:
        """Set up the world."""

    def backend(self) -> Backend:
        """A daemon's back-end; each call is another daemon."""
        raise NotImplementedError

    def settings(self, **more: Any) -> ServerSettings:
        return ServerSettings(url=f"http://127.0.0.1:{self.port}", stop_timeout_s=2.0, **more)

    def program(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    def appears(self) -> None:
        """Somebody makes the server."""
        child = subprocess.Popen(self.command, start_new_session=True)
        self.appeared.append(child)
        threading.Thread(target=child.wait, daemon=True).start()

    def starts(self) -> list[dict[str, Any]]:
        path = self.folder / "starts"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def up(self, backend: Backend, count: int) -> tuple[proc.Proc, ...]:
        if not self.makes:
            self.appears()
        until(lambda: len(self.starts()) == count and proc.port_taken(self.port), "it listens")
        return backend.find()

    def close(self) -> None:
        for child in self.appeared:  # it may not have come to write of its start yet
            child.kill()
        for start in self.starts():
            with contextlib.suppress(ProcessLookupError):
                os.kill(start["pid"], signal.SIGKILL)


class ProcessRig(Rig):
    def build(self) -> None:
        self.made: list[ProcessBackend] = []

    def backend(self) -> Backend:
        made = ProcessBackend(self.folder.name, self.settings(command=self.command), self.folder / "log")
        self.made.append(made)
        return made

    def close(self) -> None:
        super().close()
        until(lambda: not any(self._reaped(made) for made in self.made), "reaped")

    @staticmethod
    def _reaped(made: ProcessBackend) -> int:
        made._reap()
        return len(made._children)


class SystemdRig(Rig):
    def build(self) -> None:
        (self.folder / "unit").write_text(f"[Service]\nExecStart={' '.join(self.command)}\n")
        drop = self.folder / "run/systemd/system/sglang.service.d/60-stepguard-arguments.conf"
        self.systemctl = self.program("systemctl", SYSTEMCTL.format(folder=self.folder, drop=drop))

    def backend(self) -> Backend:
        given = self.settings(backend="systemd", unit="sglang.service")
        return SystemdBackend(given, systemctl=(self.systemctl,), runtime=self.folder / "run")


class InstanceRig(SystemdRig):
    """A unit that reads its arguments as the packaged one does; no drop-in can be written."""

    def build(self) -> None:
        super().build()
        launch = self.program("launch", '#!/bin/bash\nfile=$1; shift\nexec "$@" $(cat "$file" 2>/dev/null)\n')
        line = f"ExecStart={launch} %t/stepguard-arguments/%i {' '.join(self.command)}"
        (self.folder / "unit").write_text(f"[Service]\n{line}\n")
        (self.folder / "run").mkdir()
        (self.folder / "run/systemd").write_text("a file where a folder should be")

    def backend(self) -> Backend:
        given = self.settings(backend="systemd", unit="sglang@one.service")
        return SystemdBackend(given, systemctl=(self.systemctl,), runtime=self.folder / "run")


class DockerRig(Rig):
    def build(self) -> None:
        self.docker = self.program("docker", DOCKER.format(folder=self.folder, python=sys.executable))

    def backend(self) -> Backend:
        given = self.settings(
            backend="docker", container="sglang", command=["--gpus", "all", "sglang:latest", *self.command]
        )
        return DockerBackend(self.folder.name, given, docker=self.docker)


class NamedContainerRig(DockerRig):
    """Somebody's container, which only runs or does not."""

    changes = False

    def build(self) -> None:
        super().build()
        words = ["run", "--detach", "--name", "sglang", "image", "true"]
        subprocess.run([self.docker, *words], check=True, timeout=10)
        box = json.loads((self.folder / "container").read_text())
        (self.folder / "container").write_text(json.dumps(box | {"Command": self.command}))

    def backend(self) -> Backend:
        given = self.settings(backend="docker", container="sglang")
        return DockerBackend(self.folder.name, given, docker=self.docker)


class RayRig(Rig):
    """A trainer's actor on a real cluster, whose server is a child of its worker, as slime's is."""

    makes = changes = False
    address = ""
    engine: Engine | None = None

    def backend(self) -> Backend:
        given = self.settings(
            backend="ray", actor=self.folder.name, ray_address=self.address, ray_namespace="runs"
        )
        return RayBackend(given)

    def appears(self, **options: Any) -> None:
        """The trainer holds on to the handle until it has another, as trainers do."""
        self.engine = Engine(self.folder.name, self.command, **options)

    def close(self) -> None:
        if self.engine is not None:
            self.engine.end()
        super().close()


class HookRig(Rig):
    def build(self) -> None:
        rig, done = self, set()

        class Hook(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if asked["action"] == "stop":
                    rig.close()
                elif asked["intent"] not in done:
                    done.add(asked["intent"])
                    rig.command = list(overlaid(tuple(rig.command), asked["arguments"]))
                    rig.appears()
                self.send_response(200 if self.path == "/restart" else 403)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.hook = HTTPServer(("127.0.0.1", 0), Hook)
        self.url = f"http://127.0.0.1:{self.hook.server_port}"
        threading.Thread(target=self.hook.serve_forever, daemon=True).start()

    def backend(self, path: str = "/restart") -> Backend:
        return HookBackend(self.settings(backend="http", hook=f"{self.url}{path}"))


RIGS = [
    ProcessRig,
    SystemdRig,
    InstanceRig,
    DockerRig,
    NamedContainerRig,
    pytest.param(RayRig, marks=pytest.mark.xdist_group("ray")),
    HookRig,
]


@pytest.fixture(params=RIGS, ids=lambda rig: rig.__name__.removesuffix("Rig").lower())
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    if request.param is RayRig:
        RayRig.address = request.getfixturevalue("ray_cluster")
    made: Rig = request.param(tmp_path)
    yield made
    made.close()
    if isinstance(made, HookRig):
        made.hook.shutdown()
        made.hook.server_close()


def test_a_started_server_is_found_by_this_daemon_and_by_the_next(rig: Rig) -> None:
    backend = rig.backend()
    assert backend.find() == ()
    outcome = asyncio.run(backend.start("1-start", {}))
    assert outcome.ok, outcome.detail
    found = rig.up(backend, 1)
    assert found[0].pid == rig.starts()[0]["pid"]
    assert rig.backend().find()[0] == found[0]
    assert backend.quick


def test_one_intent_is_one_server_however_often_and_by_whichever_daemon_it_is_carried_out(rig: Rig) -> None:
    backend = rig.backend()
    assert asyncio.run(backend.start("1-start", {})).ok
    found = rig.up(backend, 1)
    for again in (backend, rig.backend()):
        outcome = asyncio.run(again.start("1-start", {}))
        assert outcome.ok, outcome.detail
        assert again.find()[0] == found[0]
    assert len(rig.starts()) == 1


def test_a_stop_ends_the_tree_and_frees_the_port_and_may_be_asked_for_again(rig: Rig) -> None:
    backend = rig.backend()
    asyncio.run(backend.start("1-start", {}))
    found = rig.up(backend, 1)
    for stopping in (backend, rig.backend()):
        outcome = asyncio.run(stopping.stop(found))
        assert outcome.ok, outcome.detail
        assert not any(proc.alive(known) for known in found)
        assert not proc.port_taken(rig.port)
        assert stopping.find() == ()


def test_a_server_is_started_again_with_other_arguments_or_says_that_it_is_not(rig: Rig) -> None:
    backend = rig.backend()
    asyncio.run(backend.start("1-start", {}))
    found = rig.up(backend, 1)
    asyncio.run(backend.stop(found))
    changed = {"--mem-fraction-static": "0.7", "--max-running-requests": "16"}
    outcome = asyncio.run(backend.start("2-start", changed))
    assert outcome.ok, outcome.detail
    rig.up(backend, 2)
    given = tuple(rig.starts()[1]["arguments"])
    if rig.changes:
        assert value_of(given, "--mem-fraction-static") == "0.7"
        assert value_of(given, "--max-running-requests") == "16"
    else:
        assert outcome.kept_arguments
    asyncio.run(backend.stop(backend.find()))
    asyncio.run(backend.start("3-start", {}))
    rig.up(backend, 3)
    if not isinstance(rig, HookRig):  # that one keeps what it was told
        assert value_of(tuple(rig.starts()[2]["arguments"]), "--mem-fraction-static") == "0.8"


def test_a_pid_that_is_used_again_is_nobodys_server(rig: Rig) -> None:
    """What is to be stopped is named by pid and start time; another process of that pid is left alone."""
    with contextlib.closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        bystander = subprocess.Popen(["sleep", "1000"])
        try:
            found = proc.stat(bystander.pid)
            assert found is not None
            older = proc.Proc(pid=bystander.pid, start_ticks=found.start_ticks - 1, role="server")
            outcome = asyncio.run(rig.backend().stop((older,)))
            assert outcome.ok, outcome.detail
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()


# ---- each one's own failures -------------------------------------------------------------------------


def test_a_server_of_the_trainer_is_neither_started_nor_ended_from_here() -> None:
    backend = TrainerBackend(ServerSettings(url="http://127.0.0.1:1", backend="trainer"))
    assert asyncio.run(backend.start("1-start", {})).ok
    assert asyncio.run(backend.stop((proc.Proc(pid=os.getpid(), start_ticks=0, role="server"),))).ok
    observed = ObservedBackend(ServerSettings(url="http://127.0.0.1:1", backend="none"))
    assert not asyncio.run(observed.start("1-start", {})).ok


def test_a_hook_that_refuses_is_named_without_its_token(tmp_path: Path) -> None:
    rig = HookRig(tmp_path)
    try:
        outcome = asyncio.run(rig.backend("/elsewhere?token=hunter2").start("1-start", {}))
        assert (outcome.ok, outcome.detail) == (False, "servers.hook: start of server: HTTP 403")
    finally:
        rig.close()
        rig.hook.shutdown()
        rig.hook.server_close()
    outcome = asyncio.run(rig.backend().stop(()))
    assert (outcome.ok, outcome.detail) == (False, "servers.hook: stop of server: ClientConnectorError")


def test_a_cluster_that_is_not_there_is_named_at_once(tmp_path: Path) -> None:
    rig = RayRig(tmp_path)
    rig.address = f"127.0.0.1:{free_port()}"
    outcome = asyncio.run(rig.backend().stop(()))
    assert not outcome.ok
    assert outcome.detail.startswith(f"ray kill {tmp_path.name}: no Ray cluster at {rig.address}: ")


@pytest.mark.xdist_group("ray")
def test_an_actor_in_another_namespace_is_left_alone_and_its_namespace_named(
    tmp_path: Path, ray_cluster: str
) -> None:
    rig = RayRig(tmp_path)
    rig.address = ray_cluster
    try:
        rig.appears(namespace="elsewhere")
        outcome = asyncio.run(rig.backend().stop(()))
        expected = f"the actor {tmp_path.name} is in the namespace elsewhere: set ray_namespace, now 'runs'"
        assert (outcome.ok, outcome.detail) == (False, f"ray kill {tmp_path.name}: {expected}")
        assert proc.port_taken(rig.port)
    finally:
        rig.close()


@pytest.mark.xdist_group("ray")
def test_a_stopped_actor_that_ray_starts_again_is_ended_and_its_successor_left_alone(
    tmp_path: Path, ray_cluster: str
) -> None:
    """Ray's kill does not reach a stopped worker, and a stopped server outlives its worker."""
    rig = RayRig(tmp_path)
    rig.address = ray_cluster
    try:
        rig.appears(max_restarts=1)
        assert rig.engine is not None
        until(lambda: proc.port_taken(rig.port), "it listens")
        backend = rig.backend()
        found = backend.find()
        for pid in (rig.engine.worker, found[0].pid):
            os.kill(pid, signal.SIGSTOP)
        outcome = asyncio.run(backend.stop(found))
        assert outcome.ok, outcome.detail
        assert not proc.alive(found[0])
        until(lambda: len(rig.starts()) == 2 and proc.port_taken(rig.port), "Ray's own restart")
        assert backend.find()[0].pid == rig.starts()[1]["pid"]
    finally:
        rig.close()


def test_a_docker_that_fails_is_quoted_and_its_environment_is_not(tmp_path: Path) -> None:
    rig = DockerRig(tmp_path)
    rig.program("docker", "#!/bin/sh\necho 'permission denied while trying to connect' >&2; exit 1\n")
    given = rig.settings(backend="docker", container="sglang", command=["image"], env={"HF_TOKEN": "hunter2"})
    outcome = asyncio.run(DockerBackend("run", given, docker=rig.docker).start("1-start", {}))
    assert not outcome.ok
    assert outcome.detail == "docker run sglang: permission denied while trying to connect"
    missing = DockerBackend("run", given, docker="/nowhere/docker")
    assert asyncio.run(missing.start("1-start", {})).detail.startswith("cannot run /nowhere/docker")
    assert missing.find() == ()


def test_a_container_whose_pid_is_somebody_elses_here_is_not_seen(tmp_path: Path) -> None:
    """The daemon in a container of its own sees other processes under the pids that docker names."""
    rig = DockerRig(tmp_path)
    state = {"Pid": os.getpid(), "StartedAt": "2001-01-01T00:00:00Z"}
    (tmp_path / "container").write_text(json.dumps({"State": state, "Config": {}, "Command": []}))
    assert rig.backend().find() == ()


def test_a_drop_in_that_cannot_be_written_is_told_and_the_unit_runs(tmp_path: Path) -> None:
    rig = SystemdRig(tmp_path)
    (tmp_path / "run").write_text("a file where a folder should be")
    backend = rig.backend()
    try:
        outcome = asyncio.run(backend.start("1-start", {"--max-running-requests": "8"}))
        assert outcome.ok
        assert "cannot write" in (outcome.kept_arguments or "")
        rig.up(backend, 1)
    finally:
        rig.close()


@pytest.mark.parametrize(
    "words",
    [
        "Failed to {} sglang.service: Access denied",
        "Failed to {} sglang.service: Interactive authentication required.",
    ],
)
def test_a_systemd_that_gives_no_leave_is_told_with_the_rule_that_gives_it(
    tmp_path: Path, words: str
) -> None:
    rig = SystemdRig(tmp_path)
    rig.program("systemctl", f'#!/bin/sh\necho "{words.format("$2")}" >&2\nexit 4\n')
    backend = rig.backend()
    launch = LaunchSettings(backend="systemd", unit="sglang.service")
    trainer = SystemdTrainer(launch, tmp_path, (rig.systemctl,))
    resume = Resume(path=None, step=None)
    for verb, outcome in (
        ("start", asyncio.run(backend.start("1-start", {}))),
        ("stop", asyncio.run(backend.stop(()))),
        ("start", asyncio.run(trainer.start("1-start", resume))),
        ("stop", asyncio.run(trainer.stop(()))),
    ):
        assert not outcome.ok
        said = f"systemctl {verb} sglang.service: {words.format(verb).rstrip('.')}; "
        remedy = "let the daemon's user manage sglang.service in /etc/polkit-1/rules.d/50-stepguard.rules"
        assert outcome.detail == said + remedy


def test_another_refusal_of_systemd_is_quoted_as_it_is(tmp_path: Path) -> None:
    rig = SystemdRig(tmp_path)
    rig.program("systemctl", "#!/bin/sh\necho 'Unit sglang.service not found.' >&2\nexit 5\n")
    outcome = asyncio.run(rig.backend().start("1-start", {}))
    assert outcome.detail == "systemctl start sglang.service: Unit sglang.service not found."


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("serve",), ("serve", "--max-running-requests", "8")),
        (("serve", "--max-running-requests", "32"), ("serve", "--max-running-requests", "8")),
        (("serve", "--max-running-requests=32", "-x"), ("serve", "--max-running-requests=8", "-x")),
        (("sh", "-c", 'exec "$@"', "sh", "serve"), None),
    ],
)
def test_a_flag_is_changed_where_it_stands_else_added(
    command: tuple[str, ...], expected: tuple[str, ...] | None
) -> None:
    changed = overlaid(command, {"--max-running-requests": "8"})
    assert changed == (expected or (*command, "--max-running-requests", "8"))
    assert value_of(changed, "--max-running-requests") == "8"
