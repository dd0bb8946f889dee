"""A run on three machines, all of them here: a head, an agent and a guard each, and a network that fails."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from daemon_parts.own_daemons import OwnDaemons
from grpo.server_process import free_port
from stepguard import Guard, StopRequested
from stepguard.gate import DaemonHalf, GateError, GatePage, Order
from stepguardd import proc

NODES = ("n1", "n2", "n3")
TRAINER = "n1"


class Stepper(threading.Thread):
    """A training loop with a guard: admits, steps, reports, as fast as it may."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(name=f"stepper-{run_dir.name}", daemon=True)
        self._run_dir = run_dir
        self.committed = 0
        self.stopping = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        guard = Guard(self._run_dir, heartbeat_s=0.2)
        try:
            while not self.stopping.is_set():
                step = self.committed + 1
                if not guard.admit(step, [1] * 4, rewards=[0.7, 1.0, 0.4, 0.7]).ok:
                    continue
                guard.before_step(step)
                self.committed = step
                guard.after_step(step, reward=0.7)
                time.sleep(0.02)
        except StopRequested:
            pass
        except BaseException as error:
            self.failure = error
        finally:
            guard.close()


class Cable(threading.Thread):
    """Between an agent and the head: carries bytes both ways or, when cut, none, and says nothing of it."""

    def __init__(self, to_port: int) -> None:
        super().__init__(name="cable", daemon=True)
        self._to = to_port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.cut = threading.Event()
        self.carried = 0
        self._over = threading.Event()

    def run(self) -> None:
        with selectors.DefaultSelector() as waiting, contextlib.ExitStack() as open_sockets:
            open_sockets.callback(self._listening.close)
            waiting.register(self._listening, selectors.EVENT_READ, None)
            while not self._over.is_set():
                if self.cut.is_set():
                    self._over.wait(0.02)  # what is sent meanwhile waits in the sockets
                    continue
                for key, _ in waiting.select(timeout=0.1):
                    if key.data is None:
                        near, _ = self._listening.accept()
                        far = socket.create_connection(("127.0.0.1", self._to))
                        for one, other in ((near, far), (far, near)):
                            open_sockets.callback(one.close)
                            waiting.register(one, selectors.EVENT_READ, other)
                    else:
                        self._carry(waiting, key.fileobj, key.data)

    def _carry(self, waiting: selectors.BaseSelector, one: object, other: socket.socket) -> None:
        assert isinstance(one, socket.socket)
        try:
            data = one.recv(65536)
            if data:
                other.sendall(data)
                self.carried += len(data)
                return
        except OSError:
            pass
        for each in (one, other):
            with contextlib.suppress(KeyError, ValueError):
                waiting.unregister(each)
            each.close()

    def close(self) -> None:
        self._over.set()
        self.join(timeout=10)


class Machines(OwnDaemons):
    """The head's daemon, agents by name, a guard in each one's folder."""

    def __init__(
        self,
        root: Path,
        more: Mapping[str, Mapping[str, object]] = {},
        nodes: tuple[str, ...] = NODES,
        **guard: object,
    ) -> None:
        self.port = free_port()
        root.mkdir(exist_ok=True)
        super().__init__(
            root,
            {
                "run": {"mode": "hold"},
                "web": {"enabled": False},
                "guard": guard,
                **more,
                "cluster": {
                    "listen": f"127.0.0.1:{self.port}",
                    "nodes": list(nodes),
                    "trainer": TRAINER,
                },
            },
        )
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self.steppers = {name: Stepper(self.folder(name)) for name in nodes}
        self._frozen: set[str] = set()

    def started(self) -> tuple[()]:
        return ()

    def folder(self, name: str) -> Path:
        return self.root / name

    def agent(self, name: str, *words: str, port: int | None = None, crash_at: str | None = None) -> None:
        """Start a machine's agent; with a point at which it kills itself."""
        command = [sys.executable, "-m", "stepguardd", "agent", "--node", name]
        command += ["--head", f"127.0.0.1:{port or self.port}", "--run-dir", str(self.folder(name))]
        command += ["--token-file", str(self.state_dir / "cluster.token"), *words]
        environment = self.environment() | ({} if crash_at is None else {"STEPGUARD_CRASH_AT": crash_at})
        with self.log.open("ab") as log:
            self.agents[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def signal(self, name: str, what: signal.Signals) -> None:
        self.agents[name].send_signal(what)
        if what is signal.SIGSTOP:
            self._frozen.add(name)
        elif what is signal.SIGCONT:
            self._frozen.discard(name)

    def is_stopped(self, name: str) -> bool:
        found = proc.stat(self.agents[name].pid)
        return found is not None and found.stopped

    def head_up(self) -> None:
        self.daemon()
        self.until(self.status, "the head is up")

    def all_up(self, *, through: Cable | None = None) -> None:
        """Head, agents and guards; every guard steps."""
        self.head_up()
        for name in NODES:
            port = through.port if through is not None and name == "n3" else None
            self.agent(name, port=port)
        for name in NODES:
            self.until(lambda name=name: self.page(name) is not None, f"{name} has a page")
            self.steppers[name].start()
        self.go_on(*NODES)

    def go_on(self, *names: str) -> None:
        """Each of these commits steps from now on."""
        before = {name: self.steppers[name].committed for name in names}
        for name in names:
            self.until(lambda name=name: self.steppers[name].committed > before[name] + 3, f"{name} steps")

    def held(self, *names: str) -> dict[str, int]:
        """Each of these has come to rest on a hold; how many steps each has committed."""
        for name in names:
            self.until(lambda name=name: self.page_order(name) == "HOLD", f"{name} shows HOLD")
        return self.resting(*names)

    def resting(self, *names: str) -> dict[str, int]:
        """No guard of these takes a step any more."""
        counts: dict[str, int] = {}
        for name in names:
            last = [(-1, 0.0)]

            def rests(name: str = name, last: list[tuple[int, float]] = last) -> bool:
                count, now = self.steppers[name].committed, time.monotonic()
                if count != last[0][0]:
                    last[0] = (count, now)
                return now - last[0][1] > 0.7

            self.until(rests, f"{name} rests")
            counts[name] = self.steppers[name].committed
        return counts

    def page(self, name: str) -> DaemonHalf | None:
        try:
            page = GatePage.open(self.folder(name) / "gate", writable=False)
        except GateError:
            return None
        with contextlib.closing(page):
            return page.daemon()

    def page_order(self, name: str) -> str:
        half = self.page(name)
        return "" if half is None else half.order.name

    def node(self, name: str) -> str:
        """What the head says of a machine."""
        found = [node["state"] for node in self.status().get("nodes", ()) if node["name"] == name]
        return found[0] if found else ""

    def gate(self) -> tuple[str, int, str]:
        gate = self.status().get("gate", {})
        return gate.get("order", ""), gate.get("generation", -1), gate.get("reason", "")

    def thaw(self) -> None:
        """Let everything run on that a test froze."""
        for name in self._frozen:
            self.agents[name].send_signal(signal.SIGCONT)

    def end_agents(self) -> None:
        for agent in self.agents.values():
            if agent.poll() is None:
                agent.terminate()
                try:
                    agent.wait(timeout=15)
                except subprocess.TimeoutExpired:
                    agent.kill()
                    agent.wait(timeout=10)

    def kill_agent(self, name: str) -> None:
        """End the agent, and for good."""
        agent = self.agents[name]
        if agent.poll() is None:
            os.kill(agent.pid, signal.SIGKILL)
            agent.wait(timeout=10)

    def close(self) -> None:
        for stepper in self.steppers.values():
            stepper.stopping.set()
        self.thaw()
        # Held guards are let go by taking their page away, and with it the order.
        for name, stepper in self.steppers.items():
            if stepper.is_alive():
                self.let_go(name)
                stepper.join(timeout=20)
        self.end_agents()
        super().close()
        alive = [stepper.name for stepper in self.steppers.values() if stepper.is_alive()]
        assert not alive, f"{alive} hang"
        for stepper in self.steppers.values():
            if stepper.failure is not None:
                raise stepper.failure

    def let_go(self, name: str) -> None:
        """End the agent, which writes the page, and tell the guard to stop."""
        page = self.folder(name) / "gate"
        with contextlib.suppress(OSError, GateError), contextlib.closing(GatePage.open(page)) as mapped:
            self.kill_agent(name)
            found = mapped.daemon()
            generation = 0 if found is None else found.generation
            over = "the test is over"
            mapped.publish(
                DaemonHalf(order=Order.STOP, generation=generation + 1, reason=over, lease_deadline_ns=0)
            )
