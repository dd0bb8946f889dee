"""`stepguard rollback --undo`: the command that every rollback prints."""

import json
import os
import pwd

import pytest
from runs_on_disk import KINDS, contents

from stepguardd.checkpoints.layouts import Framework
from stepguardd.cli import main


def stepguard(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


def test_undo_brings_the_folder_back_without_a_daemon(a_run, capsys: pytest.CaptureFixture[str]) -> None:
    """Byte for byte; and a second undo says that there is none, with exit code 2."""
    root = a_run(next(kind for kind in KINDS if kind.framework == Framework.VERL))
    before = contents(root)
    assert stepguard("checkpoints", "rollback", root, "--before", 25, "--json") == 0
    set_aside = json.loads(capsys.readouterr().out)["quarantined"]
    assert set_aside
    assert contents(root) != before
    rolled_back = contents(root)
    assert stepguard("rollback", "--undo", root) == 2
    assert "add --yes" in capsys.readouterr().err
    assert contents(root) == rolled_back, "nothing is taken back without a yes"
    assert stepguard("rollback", "--undo", root, "--yes", "--why", "a wrong guess", "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == set_aside
    (record,) = root.rglob("quarantine/*/*.json")
    assert (
        json.loads(record.read_text())["undone_by"] == f"{pwd.getpwuid(os.getuid()).pw_name}: a wrong guess"
    )
    assert {path: data for path, data in contents(root).items() if "quarantine" not in path} == before
    assert stepguard("rollback", "--undo", root) == 2
    assert "nothing to undo" in capsys.readouterr().err
