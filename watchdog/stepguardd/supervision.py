"""
`stepguard exec`: the small service manager of one command, where there is no other.

Promises: the daemon runs beside the command and is started again whenever it dies or falls silent, however
often; its death never ends the command. What either of them started is ended with the command, orphans
included, because this process adopts them. The command's exit code is the caller's.

It speaks systemd's own protocol (READY and WATCHDOG by sd_notify), so that the daemon need not know the
difference. One thread: it waits for signals, and between them looks at the clock.
"""

import ctypes
import functools
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from . import clock, proc
from .core.events import Proc
from .effects.processes import send

FORWARDED: Final = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)
ENDING: Final = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})

_WAITED: Final = (*FORWARDED, signal.SIGCHLD)
_TURN_S: Final = 0.25
_LATE_S: Final = 3.0
_DAEMON_END_S: Final = 15.0
_BACKOFF_FIRST_S: Final = 0.5
_BACKOFF_MAX_S: Final = 30.0
_STEADY_S: Final = 60.0
_PR_SET_CHILD_SUBREAPER: Final = 36
_SI_KERNEL: Final = 0x80
_CREDENTIALS: Final = struct.Struct("3i")
_MESSAGE_BYTES: Final = 4096


class SupervisionError(Exception):
    """The command cannot be begun; the message is one line, and `code` what to exit with."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervised:
    """
    What to run.

    Args:
        command: what it is all for; its first word is looked up in PATH.
        daemon: the daemon's command line.
        before: run once the daemon is ready; the command begins when it ends with 0. Empty: at once.
        environment: variables of the command, beside the caller's own.
        daemon_log: a file for what the daemon says; None: stderr.
        quiet_stdout: the command's stdout goes to stderr.
        ready_timeout_s: the daemon's first start.
        watchdog_s: a daemon that is not heard of for this long is ended and started again.
        end_timeout_s: what is left after the command has this long between TERM and KILL.

    """

    command: tuple[str, ...]
    daemon: tuple[str, ...]
    before: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    daemon_log: str | None = None
    quiet_stdout: bool = False
    ready_timeout_s: float = 60.0
    watchdog_s: float = 15.0
    end_timeout_s: float = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How it went: the command's exit code (128 + n for a signal), and how often the daemon came back."""

    code: int
    daemon_restarts: int


def supervise(plan: Supervised, say: Callable[[str], None]) -> Ended:
    """
    Run it to its end.

    Args:
        plan: what to run.
        say: told, in a line, what a person should know.

    Raises:
        SupervisionError: the command was not begun, and nothing is left running.

    """
    _adopt_orphans()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
    watch = _Watch(plan, say)
    try:
        return watch.run()
    finally:
        watch.end()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Watch:
    """One run of it. All state is this thread's."""

    def __init__(self, plan: Supervised, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._say = say
        self._notices = _Notices()
        self._foreground: int | None = None
        self._codes: dict[int, int] = {}
        self._told: signal.Signals | None = None
        self._turned_at = clock.monotonic()
        self._daemon: int | None = None
        self._daemon_began = 0.0
        self._heard_at = 0.0
        self._ready = False
        self._start_at = 0.0
        self._deaths = 0
        self._restarts = 0
        self._ending = False

    def run(self) -> Ended:
        """Daemon, then what comes before, then the command."""
        self._start_daemon()
        self._until_ready()
        code = 0
        for command in (self._plan.before, self._plan.command):
            if command and code == 0 and self._told is None:
                code = self._run(command)
        if self._told is not None and code == 0 and not self._foreground:
            code = 128 + self._told
        return Ended(code=code, daemon_restarts=self._restarts)

    def end(self) -> None:
        """The daemon first, so that it takes nothing for a failure; then whatever is left. Idempotent."""
        self._ending = True
        self._told = None
        if self._daemon is not None:
            os.kill(self._daemon, signal.SIGTERM)
            self._turn_until(lambda: self._daemon is None, _DAEMON_END_S)
        if self._daemon is not None:
            os.kill(self._daemon, signal.SIGKILL)
            self._turn_until(lambda: self._daemon is None, _DAEMON_END_S)
        left = self._left()
        if left:
            self._say(f"ending what was started under this command ({len(left)} processes)")
            send(left, signal.SIGTERM)
            self._turn_until(lambda: not self._left() or self._told in ENDING, self._plan.end_timeout_s)
            # In rounds: what is told to end may still start something.
            for _ in range(3):
                send(self._left(), signal.SIGKILL)
                self._turn_until(lambda: not self._left(), _TURN_S * 4)
        self._reap()
        self._notices.close()

    # ---- the command ---------------------------------------------------------------------------------

    def _run(self, command: Sequence[str]) -> int:
        environment = {**os.environ, **self._plan.environment}
        actions: list[tuple[object, ...]] = []
        if self._plan.quiet_stdout:
            actions.append((os.POSIX_SPAWN_DUP2, 2, 1))
        try:
            pid = _spawn(command, environment, actions)
        except OSError as error:
            raise SupervisionError(f"{command[0]}: {error.strerror or error}", 2) from None
        self._foreground = pid
        while pid not in self._codes:
            self._turn()
        return self._codes[pid]

    def _left(self) -> tuple[Proc, ...]:
        """What still lives under this process."""
        own = os.getpid()
        return tuple(known for known in proc.tree(own) if known.pid != own and _below(known.pid, own))

    # ---- the daemon ----------------------------------------------------------------------------------

    def _start_daemon(self) -> None:
        environment = dict(os.environ)
        environment["NOTIFY_SOCKET"] = self._notices.address
        environment["WATCHDOG_USEC"] = str(round(self._plan.watchdog_s * 1e6))
        actions: list[tuple[object, ...]] = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
        if self._plan.daemon_log is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            actions.append((os.POSIX_SPAWN_OPEN, 2, self._plan.daemon_log, flags, 0o640))
        actions.append((os.POSIX_SPAWN_DUP2, 2, 1))
        self._start_at = 0.0
        try:
            # A group of its own: a terminal's Ctrl-C is for the command.
            self._daemon = _spawn(self._plan.daemon, environment, actions, own_group=True)
        except OSError as error:
            self._daemon_died(f"could not be started ({error.strerror or error})")
            return
        self._daemon_began = self._heard_at = clock.monotonic()

    def _until_ready(self) -> None:
        """A daemon that cannot even start is a mistake to be mended before anything is trained."""
        self._turn_until(
            lambda: self._ready or self._daemon is None or self._told in ENDING, self._plan.ready_timeout_s
        )
        if self._ready or self._told in ENDING:
            return
        if self._daemon is None:
            raise SupervisionError("the daemon did not start, so the command was not begun", 2)
        raise SupervisionError(
            f"the daemon was not ready within {self._plan.ready_timeout_s:g} s, so the command was not begun",
            1,
        )

    def _look_at_daemon(self, now: float) -> None:
        for word in self._notices.take(self._daemon):
            self._heard_at = now
            if word == "READY=1":
                if self._restarts:
                    self._say("the daemon is back")
                self._ready = True
        if self._ending:
            return
        if self._daemon is None:
            if self._start_at and now >= self._start_at:
                self._restarts += 1
                self._start_daemon()
        elif self._ready and now - self._heard_at > self._plan.watchdog_s:
            self._say(f"the daemon has not been heard of for {now - self._heard_at:.0f} s; ending it")
            self._heard_at = now
            os.kill(self._daemon, signal.SIGKILL)

    def _daemon_died(self, how: str) -> None:
        now = clock.monotonic()
        lived_s = now - self._daemon_began
        self._daemon = None
        if self._ending or not self._ready:
            return
        self._deaths = 1 if lived_s >= _STEADY_S else self._deaths + 1
        wait_s = min(_BACKOFF_MAX_S, _BACKOFF_FIRST_S * 2.0 ** (self._deaths - 1))
        self._start_at = now + wait_s
        self._say(f"the daemon {how}; it is started again in {wait_s:g} s, and the command runs on")

    # ---- turns ---------------------------------------------------------------------------------------

    def _turn_until(self, what: Callable[[], bool], timeout_s: float) -> None:
        deadline = clock.monotonic() + timeout_s
        while not what() and clock.monotonic() < deadline:
            self._turn()

    def _turn(self) -> None:
        """Wait for a signal, not for long; then see to everything that may have happened."""
        info = signal.sigtimedwait(_WAITED, _TURN_S)
        now = clock.monotonic()
        if now - self._turned_at > _LATE_S:
            self._heard_at = now  # we were stopped, and so perhaps was the daemon
        self._turned_at = now
        if info is not None and info.si_signo != signal.SIGCHLD:
            self._forward(info)
        self._reap()
        self._look_at_daemon(now)

    def _forward(self, info: signal.struct_siginfo) -> None:
        what = signal.Signals(info.si_signo)
        if what in ENDING:
            self._told = what
        if self._foreground is None or self._foreground in self._codes:
            return
        # What a terminal sends goes to the whole group: the command has it already.
        if info.si_code != _SI_KERNEL:
            os.kill(self._foreground, what)

    def _reap(self) -> None:
        """Every child that ended, adopted ones too: as process 1 of a container nobody else would."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                return
            if ended is None:
                return
            exited = ended.si_code == os.CLD_EXITED
            if ended.si_pid == self._foreground:
                self._codes[ended.si_pid] = ended.si_status if exited else 128 + ended.si_status
            elif ended.si_pid == self._daemon:
                how = f"exited with code {ended.si_status}" if exited else f"was {_killed(ended.si_status)}"
                self._daemon_died(how)


class _Notices:
    """The socket of sd_notify(3): abstract, and deaf to everybody but the process that is asked for."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("")  # the kernel picks a free name
        self.address = "@" + self._socket.getsockname()[1:].decode()

    def take(self, sender: int | None) -> list[str]:
        """The words that this process has said since the last call."""
        words: list[str] = []
        with suppress(BlockingIOError):
            while True:
                content, ancillary, _, _ = self._socket.recvmsg(
                    _MESSAGE_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size)
                )
                pids = [
                    _CREDENTIALS.unpack(data)[0]
                    for level, kind, data in ancillary
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
                ]
                if sender is not None and pids == [sender]:
                    words += content.decode("utf-8", "replace").split("\n")
        return words

    def close(self) -> None:
        """Nobody is heard any more."""
        self._socket.close()


def _spawn(
    command: Sequence[str],
    environment: Mapping[str, str],
    actions: Sequence[tuple[object, ...]],
    *,
    own_group: bool = False,
) -> int:
    """With no signal blocked, and those that Python ignores as the kernel has them."""
    spawn = functools.partial(
        os.posix_spawnp,
        command[0],
        list(command),
        environment,
        file_actions=list(actions),
        setsigmask=[],
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
    )
    return spawn(setpgroup=0) if own_group else spawn()


def _adopt_orphans() -> None:
    """Be the parent of what is orphaned below: a server whose daemon died stays ours to find and to end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise SupervisionError(f"prctl: {os.strerror(ctypes.get_errno())}; Linux 3.4 or newer is needed", 2)


def _below(pid: int, ancestor: int) -> bool:
    """Whether a process descends from another: a session alone may be shared with the caller's shell."""
    for _ in range(1000):
        found = proc.stat(pid)
        if found is None or found.ppid == 0:
            return False
        if found.ppid == ancestor:
            return True
        pid = found.ppid
    return False


def _killed(number: int) -> str:
    try:
        return f"killed by {signal.Signals(number).name}"
    except ValueError:
        return f"killed by signal {number}"


def daemon_command(arguments: Sequence[str]) -> tuple[str, ...]:
    """The command line of a `stepguard` command of this very installation."""
    return (sys.executable, "-m", "stepguardd", *arguments)
