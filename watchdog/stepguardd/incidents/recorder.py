"""
The daemon's side of a report: keeps what would be gone later, and has the report written.

Never in the decision loop's way: files are touched in threads, the report is put together by a short-lived
process of low priority, and everything is bounded in time. What fails costs a part of a report, never a
decision.
"""

import asyncio
import json
import logging
import os
import shutil
import sys
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

import aiohttp
from pydantic import BaseModel

from .. import clock
from ..config import Config
from ..config.text import toml_value
from ..core.breaker import Phase
from ..core.events import Answer
from ..core.reasons import Reason
from ..core.state import State
from ..effects.backends.contract import value_of
from ..redaction import redacted, redacted_command
from ..sources import sglang
from .collected import (
    SCRAPE_BYTES_MAX,
    SERVERS_SCRAPED_MAX,
    Collected,
    LogSpan,
    Scrape,
    read_collected,
    write_collected,
    write_whole,
)
from .crash_dumps import FLAG as CRASH_DUMPS
from .folders import DATA, folder_of

log = logging.getLogger("stepguardd")

FIRST_REPORT_AFTER_S: Final = 3.0
WRITER_TIMEOUT_S: Final = 150.0
CLOSE_TIMEOUT_S: Final = 10.0
_SCRAPE_TIMEOUT_S: Final = 5.0
_STACK_TIMEOUT_S: Final = 15.0
_STACKS_MAX: Final = 8
_HUNG: Final = {Reason.SERVER_HUNG, Reason.SERVER_SPINNING, Reason.SERVER_STOPPED}


class Watched(Protocol):
    """What a report needs of a server's parts."""

    log: Path
    http: aiohttp.ClientSession

    @property
    def scrape(self) -> Scrape | None:
        """Its newest `/metrics` that is kept."""


class IncidentRecorder:
    """
    Follows the state from incident to incident.

    Args:
        config: the whole configuration.
        watched: the servers' parts, by name.

    """

    def __init__(self, config: Config, watched: Mapping[str, Watched]) -> None:
        self._config = config
        self._watched = watched
        self._tasks: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()
        self._collection: asyncio.Task[None] | None = None
        self._open: int | None = None
        self._writer: asyncio.subprocess.Process | None = None

    def saw(self, before: State, after: State) -> None:
        """Look at a decision's outcome; cheap, and called after each."""
        opened = after.incident
        if opened is not None and (before.incident is None or before.incident.number != opened.number):
            self._collection = self._begin(self._opened(after, self._scrapes()))
        elif after.phase is Phase.LOCKED_OUT and before.phase is not Phase.LOCKED_OUT and opened is not None:
            self._begin(self._ended(after, opened.number))
        closed = after.last_incident
        if closed is not None and (
            before.last_incident is None or before.last_incident.number != closed.number
        ):
            self._begin(self._ended(after, closed.number))

    def take_up(self, state: State) -> None:
        """Catch up on what an earlier daemon left: an incident without a folder, one without its report."""
        if state.last_incident is not None:
            self._begin(self._caught_up(state, state.last_incident.number))
        if state.incident is not None and not folder_of(self._state_dir, state.incident.number).is_dir():
            self._collection = self._begin(self._opened(state, self._scrapes()))

    async def close(self) -> None:
        """Stop waiting; a report that is being written gets a few seconds to be finished."""
        writer = self._writer
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if writer is not None and writer.returncode is None:
            try:
                await asyncio.wait_for(writer.wait(), CLOSE_TIMEOUT_S)
            except TimeoutError:
                await _end(writer)

    @property
    def _state_dir(self) -> Path:
        return self._config.run.state_dir

    def _scrapes(self) -> dict[str, Scrape]:
        """What each server said last before now: soon a new one will have taken its place."""
        kept = {name: server.scrape for name, server in self._watched.items()}
        return {name: scrape for name, scrape in kept.items() if scrape is not None}

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._guarded(work), name="incident report")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except OSError as error:
            log.warning("an incident's report is not complete: %s", error)
        finally:
            work.close()  # one that was cancelled before its first step was never awaited

    # ---- the opening -----------------------------------------------------------------------------------

    async def _opened(self, state: State, scrapes: Mapping[str, Scrape]) -> None:
        incident = state.incident
        assert incident is not None
        folder = folder_of(self._state_dir, incident.number)
        self._open = incident.number
        spans = await asyncio.to_thread(self._spans, state)
        walls: dict[str, float] = {}
        for name, scrape in scrapes.items():
            walls[f"{name}-before.txt"] = scrape.wall
            await asyncio.to_thread(_write_scrape, folder, f"{name}-before.txt", scrape)
        notes = await self._stacks(state, folder)
        collected = self._collected(incident.number, spans, walls, notes)
        await asyncio.to_thread(write_collected, folder, collected)
        # Whoever is called now should find a first report; one that is over soon is written once, at its end.
        self._begin(self._first_report(incident.number, folder))

    async def _first_report(self, number: int, folder: Path) -> None:
        await asyncio.sleep(FIRST_REPORT_AFTER_S)
        if self._open == number:
            await self._write(folder)

    def _spans(self, state: State) -> dict[str, LogSpan]:
        """Where each log stands at the opening."""
        paths = {name: server.log for name, server in self._watched.items()}
        if self._config.trainer.backend != "none":
            paths["trainer"] = self._config.trainer_log()
        elif state.trainer.pid is not None:
            for fd in (2, 1):
                with suppress(OSError):
                    target = Path(f"/proc/{state.trainer.pid}/fd/{fd}").readlink()
                    if target.is_file():
                        paths["trainer"] = target
        spans = {}
        for name, path in paths.items():
            with suppress(OSError):
                spans[name] = LogSpan(path=str(path), opened_at=path.stat().st_size)
        return spans

    def _collected(
        self, number: int, spans: Mapping[str, LogSpan], walls: Mapping[str, float], notes: tuple[str, ...]
    ) -> Collected:
        config = self._config
        return Collected(
            run=config.run.name,
            incident=number,
            journal=str(config.run.state_dir / "journal.db"),
            run_dir=str(config.run.run_dir),
            checkpoint_dir=None if config.checkpoints.dir is None else str(config.checkpoints.dir),
            config=tuple(in_force(config)),
            logs=spans,
            metrics_walls=walls,
            crash_dumps={
                server.name: folder
                for server in config.servers
                if (folder := value_of(tuple(server.command or ()), CRASH_DUMPS)) is not None
            },
            notes=notes,
            log_bytes_max=config.reports.log_kib << 10,
            decision_bytes_max=config.reports.decisions_mib << 20,
        )

    # ---- stacks ------------------------------------------------------------------------------------------

    async def _stacks(self, state: State, folder: Path) -> tuple[str, ...]:
        """A dump of every process that may hang, without stopping it; what cannot be had is said."""
        suspects = [
            (f"{server.name}-{known.role}-{known.pid}", known.pid)
            for server in state.servers
            if server.reason in _HUNG
            for known in server.procs
        ]
        incident = state.incident
        if incident is not None and "trainer" in incident.reason.value and state.trainer.pid is not None:
            suspects.append((f"trainer-{state.trainer.pid}", state.trainer.pid))
        if not suspects or not self._config.reports.stacks:
            return ()
        program = py_spy()
        if program is None:
            return ("no stacks: py-spy is not installed (pip install py-spy)",)
        notes = []
        for name, pid in suspects[:_STACKS_MAX]:
            stack = await _dump(program, pid)
            if stack.startswith("!"):
                notes.append(f"no stacks of {name}: {stack[1:]}")
            else:
                await asyncio.to_thread(write_whole, folder / "stacks" / f"{name}.txt", stack)
        return tuple(notes)

    # ---- the end ----------------------------------------------------------------------------------------

    async def _ended(self, state: State, number: int) -> None:
        folder = folder_of(self._state_dir, number)
        if state.incident is None:
            self._open = None
        if self._collection is not None:
            await asyncio.wait({self._collection})
        collected = await asyncio.to_thread(read_collected, folder)
        if collected is None:
            spans = await asyncio.to_thread(self._spans, state)
            collected = self._collected(number, spans, {}, ())
        walls = dict(collected.metrics_walls)
        for name in list(self._watched)[:SERVERS_SCRAPED_MAX]:
            reply = await sglang.request(
                self._watched[name].http, "GET", "/metrics", timeout_s=_SCRAPE_TIMEOUT_S
            )
            if reply.answer is Answer.OK:
                scrape = Scrape(wall=clock.wall(), body=reply.body[:SCRAPE_BYTES_MAX])
                walls[f"{name}-after.txt"] = scrape.wall
                await asyncio.to_thread(_write_scrape, folder, f"{name}-after.txt", scrape)
        spans = {name: await asyncio.to_thread(_ended_at, span) for name, span in collected.logs.items()}
        awaits = "resolved" if state.incident is None or state.incident.number != number else "locked_out"
        whole = replace(collected, logs=spans, metrics_walls=walls, awaits=awaits)
        await asyncio.to_thread(write_collected, folder, whole)
        await self._write(folder)

    async def _caught_up(self, state: State, number: int) -> None:
        stage = await asyncio.to_thread(_stage_told, folder_of(self._state_dir, number) / DATA)
        if stage != "closed":
            await self._ended(state, number)

    async def _write(self, folder: Path) -> None:
        """Have the report written; it must not take the place of anything that matters."""
        async with self._one_at_a_time:
            await self._write_now(folder)

    async def _write_now(self, folder: Path) -> None:
        reports = self._config.reports
        self._writer = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "stepguardd.incidents",
            str(folder),
            str(reports.keep),
            str(reports.total_mib),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(WRITER_TIMEOUT_S):
                _, told = await self._writer.communicate()
        except TimeoutError:
            await _end(self._writer)
            log.warning("the report in %s was not written in %g s", folder, WRITER_TIMEOUT_S)
            return
        if self._writer.returncode:
            last = told.decode("utf-8", "replace").strip().splitlines()[-1:]
            log.warning("the report in %s was not written: %s", folder, "".join(last))
        else:
            log.info("report: %s", folder)


def in_force(config: Config) -> list[tuple[str, str, bool]]:
    """Every value of a configuration: key, value as text without secrets, and whether it is no default."""
    rows: list[tuple[str, str, bool]] = []
    for section in type(config).model_fields:
        content = getattr(config, section)
        tables = (
            [(section, content)]
            if isinstance(content, BaseModel)
            else [(f"{section}.{index}", table) for index, table in enumerate(content)]
        )
        for prefix, table in tables:
            told = table.model_dump(mode="json")
            for key, value in told.items():
                if key == "command":
                    value = redacted_command(value)  # noqa: PLW2901 - what is shown of it
                shown = "(not set)" if value is None else toml_value(value)
                rows.append((f"{prefix}.{key}", redacted(shown), key in table.model_fields_set))
    return rows


def py_spy() -> str | None:
    """The program that dumps stacks: in the environment, or on PATH."""
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("py-spy")


async def _dump(program: str, pid: int) -> str:
    """The stacks of a process, which is not stopped for it; or "!" and why there are none."""
    child = await asyncio.create_subprocess_exec(
        program,
        "dump",
        "--nonblocking",
        "--pid",
        str(pid),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_STACK_TIMEOUT_S):
            stack, error = await child.communicate()
    except TimeoutError:
        await _end(child)
        return f"!py-spy has not answered for {_STACK_TIMEOUT_S:g} s"
    if child.returncode:
        return "!" + " ".join(error.decode("utf-8", "replace").split())[:300]
    return stack.decode("utf-8", "replace")


async def _end(child: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        child.kill()
    await child.wait()


def _write_scrape(folder: Path, name: str, scrape: Scrape) -> None:
    write_whole(folder / "metrics" / name, scrape.body.decode("utf-8", "replace"))


def _ended_at(span: LogSpan) -> LogSpan:
    try:
        return replace(span, ended_at=Path(span.path).stat().st_size)
    except OSError:
        return span


def _stage_told(path: Path) -> object:
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return told.get("stage") if isinstance(told, dict) else None
