"""`stepguard checkpoints` as a person and as a script meet it."""

import json
import os
import shlex
from pathlib import Path

import pytest
from runs_on_disk import KINDS, contents
from typer.testing import CliRunner, Result

from stepguardd.checkpoints.layouts import QUARANTINE, Framework
from stepguardd.checkpoints.rollback import RollbackError, undo, undo_command
from stepguardd.cli.checkpoints import app

BY_NAME = {kind.framework: kind for kind in KINDS}
VERL, TRL = BY_NAME[Framework.VERL], BY_NAME[Framework.TRL]


def stepguard(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_list_and_verify_print_one_json_list_and_nothing_else(a_run) -> None:
    root = a_run(VERL)
    VERL.spoil(root, 20)
    VERL.cut_short(root, 30)
    before = contents(root, quarantine=True)
    done = stepguard("verify", root, "--json")
    rows = json.loads(done.stdout)
    assert done.exit_code == 1
    assert done.stderr == ""
    assert [set(row) for row in rows] == [{"step", "path", "verdict", "reason", "bytes"}] * 3
    assert [(row["step"], row["verdict"]) for row in rows] == [(10, "good"), (20, "bad"), (30, "incomplete")]
    assert rows[0]["path"] == str(root / "global_step_10")
    size = sum(len(data) for name, data in contents(root / "global_step_10").items())
    assert rows[0]["bytes"] == size
    listed = stepguard("list", root, "--json", "--framework", "verl")
    assert listed.exit_code == 0
    assert [row["verdict"] for row in json.loads(listed.stdout)] == ["good", "good", "incomplete"]
    assert contents(root, quarantine=True) == before


def test_verify_of_good_ones_is_good_news(a_run) -> None:
    assert stepguard("verify", a_run(TRL), "--bandwidth", "100").exit_code == 0


def test_people_get_a_table_within_eighty_columns_and_what_the_framework_would_do(a_run) -> None:
    root = a_run(VERL)
    VERL.spoil(root, 30)
    done = stepguard("verify", root)
    lines = done.stdout.splitlines()
    assert max(len(line) for line in lines[1:]) <= 80
    assert lines[0] == f"verl checkpoints in {root}"
    assert lines[-1] == "verl would resume from step 30."
    assert any("bad" in line and "30" in line for line in lines)


def test_a_marker_to_nowhere_is_said(a_run) -> None:
    root = a_run(VERL)
    (root / "latest_checkpointed_iteration.txt").write_text("77")
    words = " ".join(stepguard("list", root).stdout.split())
    assert "names step 77, which is not there: verl would not resume from any of these." in words


def test_a_rollback_tells_a_person_what_it_did_and_how_to_undo_it(a_run) -> None:
    root = a_run(VERL)
    VERL.spoil(root, 30)
    done = stepguard("rollback", root, "--before", 31)
    assert done.exit_code == 0
    assert "Refused: step 30 is bad:" in done.stdout
    assert "Went back to step 20." in done.stdout
    assert "latest_checkpointed_iteration.txt: 30 -> 20" in done.stdout
    assert done.stdout.splitlines()[-1] == f"Undo with: {undo_command(root)}"
    assert (root / QUARANTINE).is_dir()
    again = stepguard("rollback", root, "--before", 31)
    assert "nothing to do" in again.stdout


def test_with_nothing_good_left_it_says_so_and_exits_one(a_run) -> None:
    root = a_run(TRL)
    done = stepguard("rollback", root, "--before", 10)
    assert done.exit_code == 1
    assert "no good checkpoint before step 10" in done.stderr
    assert not (root / QUARANTINE).exists()


def test_without_a_command_it_explains_itself() -> None:
    done = stepguard()
    assert done.exit_code == 0
    assert "verify" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "/nowhere"], "/nowhere is not a folder"),
        (["list", ".", "--framework", "verdi"], "--framework verdi is not known: use one of auto, verl,"),
        (["list", ".", "--framework", "custom"], "--framework custom needs --pattern"),
        (["list", ".", "--pattern", "x-{step}"], "belong to --framework custom"),
        (["list", ".", "--framework", "custom", "--pattern", "../{step}"], "no '..'"),
        (["rollback", "."], "Missing option"),
    ],
)
def test_wrong_use_is_one_clear_line_and_exit_two(arguments: list[str], words: str) -> None:
    done = stepguard(*arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_an_interrupted_rollback_is_told_and_finished_by_the_next(a_run) -> None:
    root = a_run(VERL)
    before = contents(root)
    stepguard("rollback", root, "--before", 30)
    plan = next((root / QUARANTINE).glob("*/plan.json"))
    plan.write_text(plan.read_text().replace('"done"', '"planned"'))
    listed = stepguard("list", root, "--json")
    assert "was interrupted" in listed.stderr
    assert json.loads(listed.stdout)
    dry = stepguard("rollback", root, "--before", 30, "--dry-run")
    assert (dry.exit_code, "was interrupted" in dry.stderr) == (2, True)
    done = stepguard("rollback", root, "--before", 30, "--json")
    assert "finished the interrupted rollback" in done.stderr
    assert json.loads(done.stdout)["chosen"] == 20
    undo(root)
    assert contents(root) == before


# --- undoing ------------------------------------------------------------------------------------------------


def test_undo_sets_aside_what_was_saved_meanwhile_and_says_where(a_run) -> None:
    root = a_run(VERL)
    before = contents(root)
    stepguard("rollback", root, "--before", 30)
    VERL.write(root, 30)
    meanwhile = contents(root / "global_step_30")
    undone = undo(root)
    assert contents(root) == before
    (where,) = [place for name, place in undone.displaced if name == "global_step_30"]
    assert contents(root / where) == meanwhile
    assert undone.markers == (("latest_checkpointed_iteration.txt", "30"),)


def test_several_rollbacks_are_undone_one_after_another(a_run) -> None:
    root = a_run(TRL)
    before = contents(root)
    for step in (30, 20):
        assert stepguard("rollback", root, "--before", step).exit_code == 0
    assert undo(root).steps == (20,)
    assert undo(root).steps == (30,)
    assert contents(root) == before
    with pytest.raises(RollbackError, match="nothing to undo"):
        undo(root)


def test_undo_of_a_quarantine_that_someone_emptied_touches_nothing(a_run) -> None:
    root = a_run(TRL)
    stepguard("rollback", root, "--before", 20)
    gone = next((root / QUARANTINE).glob("*/checkpoint-30"))
    gone.rename(root.parent / "taken")
    before = contents(root, quarantine=True)
    with pytest.raises(RollbackError, match="no longer in the quarantine: nothing was touched"):
        undo(root)
    assert contents(root, quarantine=True) == before


def test_a_plan_that_someone_edited_to_climb_is_not_followed(a_run) -> None:
    root = a_run(TRL)
    stepguard("rollback", root, "--before", 20)
    plan = next((root / QUARANTINE).glob("*/plan.json"))
    plan.write_text(plan.read_text().replace('"checkpoint-30"', '"../../checkpoint-30"'))
    with pytest.raises(RollbackError, match="nothing to undo"):
        undo(root)


def test_undo_where_nothing_was_rolled_back_says_so(tmp_path: Path) -> None:
    with pytest.raises(RollbackError, match="there is no quarantine/"):
        undo(tmp_path)


def test_a_markers_owner_and_mode_stay(a_run) -> None:
    root = a_run(VERL)
    marker = root / "latest_checkpointed_iteration.txt"
    marker.chmod(0o664)
    if os.geteuid() == 0:
        os.chown(marker, 1234, 1234)
    before = marker.stat()
    stepguard("rollback", root, "--before", 30)
    after = marker.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert marker.read_text() == "20"


def test_the_undo_command_can_be_pasted_into_a_shell() -> None:
    command = undo_command(Path("/runs/my run/it's"))
    assert shlex.split(command) == ["stepguard", "rollback", "--yes", "--undo", "/runs/my run/it's"]
