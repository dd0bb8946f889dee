"""
Start, warm-up, crash and drain: how the server's process tree comes and goes, and with which exit code.

As measured on SGLang 0.5.23: 0 after SIGTERM; 1 for a bad model path or a scheduler that is killed while it
starts; 3 for a port that another server holds (after the ready line: the warm-up met the other server); -9,
by its own hand, for everything else that goes wrong, after the crash diagnostics, during which the event loop
is blocked and every connection hangs.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import aiohttp
from aiohttp import web

from stepguard_grpo.server.http import Settings, State, build_app
from stepguard_grpo.server.link import SchedulerDiedError, SchedulerLink, kill_all, kill_tree
from stepguard_grpo.server.shape import read_shape

CHILD_POLL_S = 0.5
DRAIN_LOG_S = 5.0
EXIT_BAD_MODEL = 1
EXIT_PORT_TAKEN = 3

log = logging.getLogger("stepguard_grpo.server")


async def serve(settings: Settings) -> int:
    """Run until told to stop; returns the exit code, or kills the process as SGLang would."""
    try:
        shape = read_shape(Path(settings.model_path))
    except (OSError, KeyError, ValueError) as error:
        log.error("%s: %s is not a model directory: %s", type(error).__name__, settings.model_path, error)
        return EXIT_BAD_MODEL
    link = SchedulerLink(
        Path(settings.model_path),
        settings.weight_version,
        settings.max_running_requests,
        memory=(str(settings.request_bytes), settings.pretended_gpu or "", str(settings.mem_fraction_static)),
    )
    state = State(
        settings=settings,
        shape=shape,
        link=link,
        started_at=time.time(),
        launch_command=shlex.join(sys.orig_argv),
        model_path=settings.model_path,
        served_model_name=settings.served_model_name,
        weight_version=settings.weight_version,
    )
    stop = asyncio.Event()
    _handle_signals(state, stop)
    try:
        await link.start()
    except SchedulerDiedError as died:
        log.error(
            "Rank 0 scheduler died during initialization (exit code: %d). "
            "If exit code is -9 (SIGKILL), a common cause is the OS OOM killer.",
            died.code,
        )
        # One that failed by itself has sent SIGQUIT before; give that signal its turn.
        await asyncio.sleep(0.5)
        return EXIT_BAD_MODEL
    runner = web.AppRunner(
        build_app(state),
        handle_signals=False,
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=0.2,
    )
    await runner.setup()
    watcher = asyncio.create_task(_watch_scheduler(state))
    try:
        code = await _listen_and_wait(runner, state, stop)
    finally:
        watcher.cancel()
        kill_tree(link)
        await runner.cleanup()
    return code


def _handle_signals(state: State, stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    loop.add_signal_handler(signal.SIGQUIT, _on_sigquit, state)


async def _listen_and_wait(runner: web.AppRunner, state: State, stop: asyncio.Event) -> int:
    settings = state.settings
    clash: OSError | None = None
    try:
        await web.TCPSite(runner, settings.host, settings.port, backlog=2048).start()
    except OSError as error:
        clash = error
    if clash is None:
        log.info("Uvicorn running on http://%s:%d (embedded)", settings.host, settings.port)
    # The warm-up asks whoever answers on the port, and believes it: so a clash still prints the ready line.
    state.starting = False
    warm = await _warm_up(settings, stop)
    if not warm and not stop.is_set():
        log.error("Initialization failed. warmup error: nobody answered on port %d", settings.port)
        kill_all(state.link)
    if warm:
        log.info("The server is fired up and ready to roll!")
    if clash is not None:
        address = (settings.host, settings.port)
        log.error(
            "[Errno %s] error while attempting to bind on address %s: %s",
            clash.errno,
            address,
            clash.strerror,
        )
        return EXIT_PORT_TAKEN
    await stop.wait()
    await _drain(state)
    return 0


async def _warm_up(settings: Settings, stop: asyncio.Event) -> bool:
    base = f"http://{'127.0.0.1' if settings.host == '0.0.0.0' else settings.host}:{settings.port}"  # noqa: S104 - compared
    request = {"input_ids": [1], "sampling_params": {"temperature": 0, "max_new_tokens": 2}}
    deadline = time.monotonic() + settings.warmup_timeout_s
    timeout = aiohttp.ClientTimeout(total=min(10.0, settings.warmup_timeout_s))
    async with aiohttp.ClientSession(base, timeout=timeout) as session:
        while time.monotonic() < deadline and not stop.is_set():
            try:
                async with (
                    session.get("/model_info") as info,
                    session.post("/generate", json=request) as made,
                ):
                    if info.status == 200 and made.status == 200:
                        return True
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(0.2)
    return False


async def _watch_scheduler(state: State) -> None:
    process = state.link.process
    while (code := process.poll()) is None:  # noqa: ASYNC110 - SGLang's own watcher polls, and that shows
        await asyncio.sleep(CHILD_POLL_S)
    if state.draining:
        return
    log.error(
        "Subprocess scheduler_0 (pid=%d) crashed with exit code %d. Triggering SIGQUIT for cleanup...",
        process.pid,
        code,
    )
    _on_sigquit(state)


def _on_sigquit(state: State) -> NoReturn:
    """Crash. Blocks the loop while it diagnoses, on purpose: connections open and get no answer."""
    if state.starting:
        log.error("Received sigquit from a child process. It usually means the child failed.")
        kill_all(state.link)
    log.error("SIGQUIT received. signum=None, frame=None. It usually means one child failed.")
    seconds = state.settings.crash_diagnostics_s
    if seconds > 0:
        log.error("Sleeping %g seconds before crash diagnostics to let GPU activity settle.", seconds)
        time.sleep(seconds)
        alive = state.link.process.poll() is None
        log.error(
            "Pyspy dump for PID %d" if alive else "No live scheduler processes found; PID was %d",
            state.link.process.pid,
        )
    kill_all(state.link)


async def _drain(state: State) -> None:
    """Let requests end, new ones too, then the scheduler; no deadline unless known unhealthy."""
    log.info("SIGTERM received. signum=15 frame=None. Draining requests and shutting down...")
    unhealthy, state.draining = state.unhealthy, True
    said_at = -DRAIN_LOG_S
    while state.in_flight and state.link.process.poll() is None:
        if unhealthy:
            log.error("Signal SIGTERM received while health check failed. Force exiting.")
            break
        if time.monotonic() - said_at >= DRAIN_LOG_S:
            said_at = time.monotonic()
            log.info("Gracefully exiting... Remaining number of requests %d.", state.in_flight)
        await asyncio.sleep(0.05)
    state.link.shut_down()
    deadline = time.monotonic() + state.settings.shutdown_grace_s
    while state.link.process.poll() is None and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    if state.link.process.poll() is None:
        log.error(
            "Schedulers still alive %gs after ShutdownReq, killing them before they released: [%d]",
            state.settings.shutdown_grace_s,
            state.link.process.pid,
        )
