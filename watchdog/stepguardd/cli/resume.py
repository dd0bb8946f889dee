"""`stepguard resume`: end a person's pause, or a lock-out once its cause is removed."""

from stepguardd.cli.runs import AsJson, ConfigFile, RunDir, Why
from stepguardd.cli.wishes import tell


def resume(*, run_dir: RunDir = None, config: ConfigFile = None, why: Why = "", json: AsJson = False) -> None:
    """Let a held run go on: after a pause, or after a lock-out whose cause is removed."""
    done = "The run will go on as soon as nothing else holds it. Watch: stepguard status --watch"
    tell("resume", config=config, run_dir=run_dir, why=why, as_json=json, done=done)
