"""
What keeps one machine's agent alive: an actor of Ray's there, which starts it and starts it again.

The agent is a plain process of its own, and lives as long as the keeper does: where Ray loses the machine, or
kills what it runs there, the agent goes too, and the head hears of it. The keeper needs the standard library
alone, so Ray's own environment on the machine may be the trainer's.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any, Final

from .. import clock

TOKEN_FILE: Final = "cluster.token"  # noqa: S105 - a name
LOG_FILE: Final = "agent.log"
LOG_BYTES_MAX: Final = 1 << 20
SAID_BYTES_MAX: Final = 2000
STOP_S: Final = 10.0
PAUSE_MIN_S: Final = 0.2
"""An agent that died is back before the head counts its machine as lost."""
PAUSE_MAX_S: Final = 30.0
SETTLED_S: Final = 60.0


def pause_s(before_s: float, lived_s: float) -> float:
    """How long to wait before the next start, after a pause of `before_s` and a life of `lived_s`."""
    return PAUSE_MIN_S if lived_s >= SETTLED_S else min(PAUSE_MAX_S, 2 * before_s)


class AgentKeeper:
    """
    One machine's agent, kept alive.

    A keeper that Ray starts again, after its process was killed, finds the token on the machine and goes on.

    Args:
        python: the interpreter with `stepguard[daemon]`; None for this one.
        head: host and port at which the head listens.
        node: this machine's name in `cluster.nodes`.
        run_dir: where its gate page is.
        machine: Ray's id of the machine, for whoever asks.
        config: the run's config, if it can be read here under this path; without it the agent starts nothing.

    """

    def __init__(
        self, python: str | None, head: str, node: str, run_dir: str, machine: str, config: str
    ) -> None:
        self._python, self._head, self._node, self._machine = python, head, node, machine
        self._config = config
        self._run_dir = Path(run_dir)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._agent: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._ready, self._starts, self._why = False, 0, ""
        if self._token_file.exists():
            self._keep()

    def begin(self, token: str) -> str:
        """
        Keep an agent here that holds this token. Again with the same one: nothing.

        Returns:
            Why it cannot be, or "".

        """
        try:
            self._run_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
            if self._run_dir.stat().st_uid != os.geteuid():
                return f"{self._run_dir}: is another user's; give --run-dir a folder of ours"
            changed = not self._token_file.exists() or self._token_file.read_text().strip() != token
            if changed:
                self._write(token)
        except OSError as error:
            return f"{error.filename or self._run_dir}: {error.strerror}; give --run-dir a folder of ours"
        agent = self._agent
        if changed and agent is not None:
            agent.terminate()  # and with the new token it comes again
        self._keep()
        return ""

    def told(self) -> dict[str, Any]:
        """What is kept here, and how that goes."""
        with self._lock:
            agent = self._agent
            alive = agent is not None and agent.poll() is None
            return {
                "python": self._python,
                "head": self._head,
                "run_dir": str(self._run_dir),
                "machine": self._machine,
                "config": self._config,
                "pid": agent.pid if agent is not None and alive else None,
                "joined": self._ready and alive,
                "starts": self._starts,
                "why": self._why,
            }

    def end(self) -> None:
        """End the agent, which says goodbye to the head, and take the token away."""
        self._over.set()
        agent, thread = self._agent, self._thread
        if agent is not None and agent.poll() is None:
            agent.terminate()
            try:
                agent.wait(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                agent.kill()
        if thread is not None:
            thread.join(timeout=STOP_S)
        self._token_file.unlink(missing_ok=True)

    @property
    def _token_file(self) -> Path:
        return self._run_dir / TOKEN_FILE

    def _write(self, token: str) -> None:
        fresh = self._token_file.with_name(f".{TOKEN_FILE}")
        fresh.unlink(missing_ok=True)
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(token + "\n")
        fresh.replace(self._token_file)

    def _keep(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._supervise, name="agent-keeper", daemon=True)
            self._thread.start()

    def _supervise(self) -> None:
        """Start the agent, wait for its end, and again."""
        pause = PAUSE_MIN_S / 2
        while not self._over.is_set():
            began = clock.monotonic()
            try:
                agent = self._start()
            except OSError as error:
                why = f"{error.filename or self._run_dir}: {error.strerror}"
            else:
                assert agent.stdin is not None
                assert agent.stdout is not None
                with agent.stdin:
                    self._hear(agent.stdout)
                    code = agent.wait()
                why = f"it ended with {code}{self._last_words()}"
            with self._lock:
                self._ready, self._why = False, why
            pause = pause_s(pause, clock.monotonic() - began)
            self._over.wait(pause)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [self._python or sys.executable, "-m", "stepguardd", "agent", "--while-stdin", "--json"]
        command += ["--head", self._head, "--node", self._node]
        command += ["--run-dir", str(self._run_dir), "--token-file", str(self._token_file)]
        if os.access(self._config, os.R_OK):
            command += ["--config", self._config]
        log = self._run_dir / LOG_FILE
        too_long = log.exists() and log.stat().st_size > LOG_BYTES_MAX
        with log.open("wb" if too_long else "ab") as words:
            agent = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # ours alone, so it closes with us, however we end
                stdout=subprocess.PIPE,
                stderr=words,
                start_new_session=True,
            )
        with self._lock:
            self._agent, self._starts = agent, self._starts + 1
        if self._over.is_set():
            agent.terminate()
        return agent

    def _hear(self, stdout: IO[bytes]) -> None:
        """Its one line, when the head has taken it in; then nothing until it ends."""
        with stdout:
            for line in stdout:
                try:
                    ready = json.loads(line).get("ready") is True
                except (ValueError, AttributeError):
                    continue
                if ready:
                    with self._lock:
                        self._ready, self._why = True, ""

    def _last_words(self) -> str:
        try:
            with (self._run_dir / LOG_FILE).open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - SAID_BYTES_MAX))
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return f": {lines[-1]}" if lines else ""
