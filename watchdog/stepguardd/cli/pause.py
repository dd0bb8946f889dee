"""`stepguard pause`: hold the run before its next optimizer step, until somebody resumes it."""

from stepguardd.cli.runs import AsJson, ConfigFile, RunDir, Why
from stepguardd.cli.wishes import tell


def pause(*, run_dir: RunDir = None, config: ConfigFile = None, why: Why = "", json: AsJson = False) -> None:
    """Hold the run before its next optimizer step, until `stepguard resume`."""
    done = "The run will hold before its next optimizer step. Go on with: stepguard resume"
    tell("pause", config=config, run_dir=run_dir, why=why, as_json=json, done=done)
