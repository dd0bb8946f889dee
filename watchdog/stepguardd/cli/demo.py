"""`stepguard demo`: one real training run with a real fault, protected; beside it, the same without."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from stepguardd.cli.output import bad_news, fail, print_json, say
from stepguardd.demo.conduct import DemoError, Plan, Progress, conduct
from stepguardd.demo.faults import INSIDE_THE_TRAINER, SCENARIOS, Fault, PauseMode
from stepguardd.demo.outcome import Figures, as_expected, report
from stepguardd.demo.servers import ServerKind, ServerMissingError, server_program
from stepguardd.demo.view import View


def demo(
    fault: Annotated[
        Fault, typer.Option("--fault", metavar="FAULT", help=f"What goes wrong: {', '.join(Fault)}.")
    ] = Fault.KILL,
    server: Annotated[
        ServerKind, typer.Option("--server", help="What makes the rollouts; sglang needs `make sglang`.")
    ] = ServerKind.EMBEDDED,
    steps: Annotated[int, typer.Option("--steps", min=40, max=5000, help="Optimizer steps.")] = 150,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the model, the data and the sampling.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Then run the same without Stepguard, and print both.")
    ] = False,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="Where the runs are kept [default: demo-runs/<time>-<fault>]."),
    ] = None,
    pause_mode: Annotated[
        PauseMode, typer.Option("--pause-mode", help="How --fault pause pauses the server.")
    ] = PauseMode.IN_PLACE,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Save the last picture as SVG.", dir_okay=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Plain lines instead of the live picture.")] = False,
) -> None:
    """
    A real training run with a real fault, protected.

    A small Llama learns a task by GRPO in about a minute; its rollouts come from an SGLang-compatible server,
    or with --server sglang from a real one.
    Once the reward has risen the fault is injected, with real signals to real processes.
    Exit code 0: Stepguard did what this fault's scenario promises; 1: it did not.
    """
    scenario = SCENARIOS[fault]
    if fault is Fault.DETOKENIZER and server is not ServerKind.SGLANG:
        fail("--fault detokenizer: only a real server has one; add --server sglang")
    if fault is Fault.OOM and server is not ServerKind.EMBEDDED:
        fail("--fault oom: how much memory a request takes is an argument of the embedded server alone")
    try:
        server_program(server)
    except ServerMissingError as error:
        fail(f"--server {server.value}: {error}")
    root = (folder or Path("demo-runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{fault.value}").absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--dir: cannot make {root} ({error.strerror})")
    if any(root.iterdir()):
        fail(f"--dir: {root} is not empty; name another folder")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # told to end, it ends its processes too
    view = View(scenario, plain=no_ui or as_json or not sys.stderr.isatty(), picture=picture)
    fixed = round(0.5 * steps) if fault in INSIDE_THE_TRAINER else None
    plan = Plan(
        scenario=scenario,
        root=root / "guarded",
        guarded=True,
        steps=steps,
        seed=seed,
        fault_step=fixed,
        server=server,
        pause_mode=pause_mode,
    )
    try:
        with view:
            first, guarded = _run(plan, view)
            unguarded: Figures | None = None
            if compare:
                second = Plan(
                    scenario=scenario,
                    root=root / "unguarded",
                    guarded=False,
                    steps=steps,
                    seed=seed,
                    fault_step=first.fault_step,
                    server=server,
                    pause_mode=pause_mode,
                )
                _, unguarded = _run(second, view)
            view.conclude(guarded, unguarded)
    except DemoError as error:
        fail(str(error))
    except KeyboardInterrupt:
        say("stopped; every process of the demo has ended")
        raise typer.Exit(1) from None
    if as_json:
        print_json(report(fault, first.fault_step, guarded, unguarded))
    wrong = as_expected(scenario, guarded)
    if wrong:
        bad_news(f"not as expected: {'; '.join(wrong)} (the run is in {os.path.relpath(root)})")


def _run(plan: Plan, view: View) -> tuple[Progress, Figures]:
    plan.root.mkdir(parents=True, exist_ok=True)
    view.begin(plan)
    return conduct(plan, view.look)
