"""
What runs on this machine, found without being told: servers, trainers, W&B runs, checkpoints, daemons.

Everything comes from /proc (proc(5)): command lines, working folders, open files, and environments where they
may be read. Nothing is asked over the network here, and nothing is changed. What cannot be read is None or
empty, never guessed.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from .. import proc
from ..control.contract import SOCKET_NAME
from ..places import run_roots

_PROC: Final = Path("/proc")
_ENVIRON_BYTES_MAX: Final = 1 << 20
_SGLANG_PORT: Final = 30_000
_SERVER: Final = re.compile(r"\bsglang\.launch_server\b|\bsglang[/ ]serve\b|\bstepguard_grpo[./]server\b")
_PART: Final = re.compile(r"\bsglang::(scheduler|detokenizer|data_parallel|tokenizer)")

# What a trainer's command line holds, by framework; the first that fits.
_TRAINERS: Final = (
    ("verl", re.compile(r"\bverl\.(?:experimental\.\w+|trainer)\b|\bmain_ppo\b")),
    ("openrlhf", re.compile(r"\bopenrlhf\.cli\.train")),
    ("prime-rl", re.compile(r"\bprime_rl\b")),
    ("nemo-rl", re.compile(r"\bnemo_rl\b|\brun_grpo\w*\.py\b")),
    ("skyrl", re.compile(r"\bskyrl\w*\b")),
    ("areal", re.compile(r"\bareal\b|\bAReaL\b")),
    ("roll", re.compile(r"\bstart_(?:rlvr|agentic)\w*_pipeline\b|\broll\.pipeline\b")),
    ("miles", re.compile(r"\bmiles\b.*\btrain(?:_async)?\.py\b")),
    (
        "slime",
        re.compile(r"\bslime\b.*\btrain(?:_async)?\.py\b|\btrain(?:_async)?\.py\b.*--rollout-batch-size"),
    ),
    ("trl", re.compile(r"\btrl\b.*\bgrpo\b|grpo\w*\.py\b|\bstepguard_grpo\.train\b")),
)
# Options whose value is where checkpoints go, as the frameworks call it.
_SAVES: Final = re.compile(
    r"^(?:--)?(?:save|save[_-]path|output[_-]dir|ckpt[_-]path|checkpoint[_-]dir|run[_-]root|"
    r"trainer\.default_local_dir|trainer\.ckpt_path|checkpointing\.checkpoint_dir|cluster\.fileroot|"
    r"trainer\.output_dir|hydra\.run\.dir)$"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process; None is what may not be read."""

    pid: int
    ppid: int
    session: int
    state: str
    comm: str
    command: tuple[str, ...]
    uid: int
    cwd: Path | None = None
    environ: Mapping[str, str] | None = None
    files: tuple[Path, ...] = ()
    output: Path | None = None
    rss_bytes: int | None = None

    @property
    def line(self) -> str:
        """The command as one text."""
        return " ".join(self.command)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundServer:
    """An inference server: its first process, its tree, and where it should answer."""

    process: Process
    tree: tuple[Process, ...]
    host: str
    port: int | None
    real: bool

    @property
    def url(self) -> str:
        """Where to ask it from this machine."""
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundTrainer:
    """A training process, the topmost of its tree; `framework` is None where its command does not tell."""

    process: Process
    framework: str | None
    run_dir: Path | None
    ranks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """All that was found."""

    processes: tuple[Process, ...] = ()
    servers: tuple[FoundServer, ...] = ()
    orphans: tuple[Process, ...] = ()
    trainers: tuple[FoundTrainer, ...] = ()
    wandb: tuple[Path, ...] = ()
    saves: tuple[Path, ...] = ()
    sockets: tuple[Path, ...] = ()
    unreadable: int = 0
    logs: Mapping[str, Path] = field(default_factory=dict)


def look() -> Machine:
    """Look at the whole machine once."""
    return found_in(tuple(_processes()), Listening())


def found_in(processes: Sequence[Process], listening: "Listening") -> Machine:
    """What these processes are. `listening` tells the TCP ports on which any of some pids listens."""
    known = {process.pid: process for process in processes}
    servers = tuple(_servers(processes, known, listening))
    serving = {part.pid for server in servers for part in server.tree}
    orphans = tuple(
        process for process in processes if _PART.search(_title(process)) and process.pid not in serving
    )
    trainers = tuple(_trainers(processes, known, serving))
    logs = {f"server on port {one.port}": one.process.output for one in servers}
    logs |= {f"trainer (pid {one.process.pid})": one.process.output for one in trainers}
    sockets = tuple(sorted(path for root in run_roots() for path in root.glob(f"*/{SOCKET_NAME}")))
    in_use = {one.run_dir / SOCKET_NAME for one in trainers if one.run_dir is not None}
    return Machine(
        processes=tuple(processes),
        servers=servers,
        orphans=orphans,
        trainers=trainers,
        wandb=tuple(_wandb(processes, trainers)),
        saves=tuple(_saves(trainers)),
        sockets=tuple(dict.fromkeys([*sockets, *(path for path in sorted(in_use) if path.exists())])),
        unreadable=sum(process.environ is None for process in processes),
        logs={name: path for name, path in logs.items() if path is not None},
    )


# --- /proc


def _processes() -> Iterator[Process]:
    for found in proc.every():
        folder = _PROC / str(found.pid)
        command = _split(_read(folder / "cmdline"))
        if not command:
            continue  # a thread of the kernel, or a zombie: its parent is what matters
        files = tuple(_open_files(folder / "fd"))
        output = next((path for fd, path in files if fd in {1, 2} and path.is_file()), None)
        try:
            uid = folder.stat().st_uid
        except OSError:
            continue
        yield Process(
            pid=found.pid,
            ppid=found.ppid,
            session=found.session,
            state=found.state,
            comm=found.comm,
            command=command,
            uid=uid,
            cwd=_link(folder / "cwd"),
            environ=_environ(folder / "environ"),
            files=tuple(path for _, path in files),
            output=output,
            rss_bytes=_rss(folder / "statm"),
        )


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_ENVIRON_BYTES_MAX)
    except OSError:
        return b""


def _split(raw: bytes) -> tuple[str, ...]:
    return tuple(part.decode("utf-8", "replace") for part in raw.split(b"\0") if part)


def _environ(path: Path) -> dict[str, str] | None:
    try:
        with path.open("rb") as file:
            raw = file.read(_ENVIRON_BYTES_MAX)
    except OSError:
        return None
    pairs = (part.partition("=") for part in _split(raw))
    return {name: value for name, equals, value in pairs if equals}


def _open_files(folder: Path) -> Iterator[tuple[int, Path]]:
    with suppress(OSError):
        for name in os.listdir(folder):  # noqa: PTH208 - names alone
            target = _link(folder / name)
            if (
                target is not None
                and target.is_absolute()
                and not str(target).startswith(("/dev/", "/proc/"))
            ):
                yield int(name), target


def _link(path: Path) -> Path | None:
    try:
        return path.readlink()
    except OSError:
        return None


def _rss(path: Path) -> int | None:
    fields = _read(path).split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 and fields[1].isdigit() else None


class Listening:
    """The TCP ports that processes of this machine listen on; a table that is read once."""

    def __init__(self) -> None:
        self._inodes: dict[str, int] = {}
        for name in ("tcp", "tcp6"):
            with suppress(OSError):
                for line in (_PROC / "net" / name).read_text().splitlines()[1:]:
                    fields = line.split()
                    if len(fields) > 9 and fields[3] == "0A":
                        self._inodes[fields[9]] = int(fields[1].rpartition(":")[2], 16)

    def ports(self, pids: Iterable[int]) -> set[int]:
        """Where any of these listens."""
        found = set()
        for pid in pids:
            with suppress(OSError):
                for fd in (_PROC / str(pid) / "fd").iterdir():
                    name = str(_link(fd) or "")
                    if name.startswith("socket:[") and name[8:-1] in self._inodes:
                        found.add(self._inodes[name[8:-1]])
        return found


# --- Servers


def _title(process: Process) -> str:
    return process.command[0] if process.command else process.comm


def _is_server(process: Process) -> bool:
    return bool(_SERVER.search(process.line)) and not _PART.search(_title(process))


def _servers(
    processes: Sequence[Process], known: Mapping[int, Process], listening: Listening
) -> Iterator[FoundServer]:
    roots = {p.pid for p in processes if _is_server(p) and _runs_python(p)}
    for process in processes:  # one that another program started under its own name
        parent = known.get(process.ppid)
        if _PART.search(_title(process)) and parent is not None and parent.ppid and process.ppid != 1:
            roots.add(process.ppid)
    for pid in sorted(roots):
        process = known[pid]
        if any(ancestor in roots for ancestor in _ancestors(process, known)) or _PART.search(_title(process)):
            continue
        tree = _tree(process, processes)
        ports = listening.ports(part.pid for part in tree)
        yield FoundServer(
            process=process,
            tree=tree,
            host=_host(_option(process.command, "--host")),
            port=_port(process, ports),
            real="stepguard_grpo" not in process.line,
        )


def _runs_python(process: Process) -> bool:
    """A shell or an editor that only names the module is no server."""
    name = Path(_title(process)).name
    return "python" in name or name.startswith(("sglang", "stepguard"))


def _ancestors(process: Process, known: Mapping[int, Process]) -> Iterator[int]:
    seen = set()
    here: Process | None = process
    while here is not None and here.ppid not in seen and here.ppid > 1:
        seen.add(here.ppid)
        yield here.ppid
        here = known.get(here.ppid)


def _tree(root: Process, processes: Sequence[Process]) -> tuple[Process, ...]:
    members = {root.pid}
    grown = True
    while grown:
        more = {p.pid for p in processes if p.ppid in members and p.pid not in members}
        grown = bool(more)
        members |= more
    return (root, *(p for p in processes if p.pid in members and p.pid != root.pid))


def _option(command: Sequence[str], name: str) -> str | None:
    """The value of an option, in both spellings."""
    for at, argument in enumerate(command):
        if argument == name and at + 1 < len(command):
            return command[at + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


def _host(told: str | None) -> str:
    """An address to listen on as one to call."""
    if told in {None, "", "0.0.0.0", "::", "localhost"}:  # noqa: S104 - it is compared, not bound
        return "127.0.0.1"
    return f"[{told}]" if told is not None and ":" in told else str(told)


def _port(process: Process, ports: set[int]) -> int | None:
    told = _option(process.command, "--port")
    if told is not None and told.isdigit():
        return int(told)
    if _SGLANG_PORT in ports or not ports:
        return _SGLANG_PORT
    return min(ports)


# --- Trainers


def _trainers(
    processes: Sequence[Process], known: Mapping[int, Process], serving: set[int]
) -> Iterator[FoundTrainer]:
    found = {p.pid: name for p in processes if p.pid not in serving and (name := _framework(p)) is not None}
    for process in processes:
        if process.pid in serving or process.pid in found or _is_stepguard(process):
            continue
        guarded = process.environ is not None and "STEPGUARD_RUN_DIR" in process.environ
        if guarded and _runs_python(process):
            found[process.pid] = ""
    for pid, framework in sorted(found.items()):
        process = known[pid]
        if any(ancestor in found for ancestor in _ancestors(process, known)):
            continue
        told = (process.environ or {}).get("STEPGUARD_RUN_DIR")
        yield FoundTrainer(
            process=process,
            framework=framework or None,
            run_dir=Path(told) if told else None,
            ranks=sum(1 for part in _tree(process, processes) if part.pid in found),
        )


def _framework(process: Process) -> str | None:
    """Whose trainer a command line is."""
    if not _runs_python(process) and not Path(_title(process)).name.startswith(
        ("torchrun", "deepspeed", "ray::")
    ):
        return None
    if _is_stepguard(process) or _is_server(process):
        return None
    line = process.line
    return next((name for name, pattern in _TRAINERS if pattern.search(line)), None)


def _is_stepguard(process: Process) -> bool:
    return bool(re.search(r"\bstepguardd\b|/stepguard\b|^stepguard\b", process.line))


def _wandb(processes: Sequence[Process], trainers: Sequence[FoundTrainer]) -> list[Path]:
    """The logs of W&B that somebody has open, and the newest of each trainer's folder."""
    found = {path for process in processes for path in process.files if path.suffix == ".wandb"}
    for trainer in trainers:
        if trainer.process.cwd is not None and not found:
            with suppress(OSError):
                found |= set((trainer.process.cwd / "wandb" / "latest-run").resolve().glob("run-*.wandb"))
    return sorted(found)


def _saves(trainers: Sequence[FoundTrainer]) -> list[Path]:
    """Where trainers may save: what their commands say, and their working folders."""
    found: dict[Path, None] = {}
    for trainer in trainers:
        cwd = trainer.process.cwd or Path("/")
        arguments = trainer.process.command
        for at, argument in enumerate(arguments):
            name, equals, value = argument.partition("=")
            if not equals and at + 1 < len(arguments):
                value = arguments[at + 1]
            if value and _SAVES.match(name):
                found[cwd / Path(value).expanduser()] = None
        found[cwd] = None
    return [path for path in found if path.is_dir() and path != Path("/")]
