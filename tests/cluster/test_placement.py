"""Which machine of Ray's a name means, and what is wrong use of `stepguard cluster`."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepguardd.cli import main
from stepguardd.cluster.keeper import PAUSE_MAX_S, PAUSE_MIN_S, SETTLED_S, pause_s
from stepguardd.cluster.placement import Machine, Wanted, meant

ONE = Machine(ray_id="a1", name="10.0.0.1", hostname="gpu1.example", address="10.0.0.1")
TWO = Machine(ray_id="b2", name="10.0.0.2", hostname="gpu2.example", address="10.0.0.2")


@pytest.mark.parametrize("name", ["gpu2.example", "gpu2", "10.0.0.2"])
def test_a_machine_is_meant_by_its_host_name_or_its_address(name: str) -> None:
    assert meant([name], [ONE, TWO]) == {name: TWO}


def test_rays_own_name_goes_before_host_names_that_are_alike() -> None:
    twins = [Machine(ray_id=name, name=name, hostname="n2", address="10.0.0.1") for name in ("n1", "n2")]
    assert meant(["n1", "n2"], twins) == {"n1": twins[0], "n2": twins[1]}
    assert "--node-name" in str(meant(["10.0.0.1"], twins)["10.0.0.1"])


def test_a_name_that_ray_does_not_know_is_answered_with_those_it_has() -> None:
    assert meant(["gpu3"], [ONE, TWO]) == {"gpu3": "Ray has no such machine alive; it has 10.0.0.1, 10.0.0.2"}


def test_what_is_kept_stays_only_where_it_is_what_is_wanted() -> None:
    wanted = Wanted(node="gpu1", head="10.0.0.9:8723", run_dir="/run/stepguard/r", python=None, config="/c")
    told = {"head": wanted.head, "run_dir": wanted.run_dir, "python": None, "config": "/c"}
    told |= {"machine": "a1", "pid": 7}
    assert wanted.is_kept(told, ONE)
    assert not wanted.is_kept(told, TWO), "a machine that came back is another one to Ray"
    for key in ("head", "run_dir", "python", "config"):
        assert not wanted.is_kept({**told, key: "/other"}, ONE)


def test_an_agent_that_dies_again_and_again_is_started_ever_more_rarely() -> None:
    pauses = [PAUSE_MIN_S]
    for _ in range(12):
        pauses.append(pause_s(pauses[-1], lived_s=1))
    assert pauses == sorted(pauses)
    assert pauses[-1] == PAUSE_MAX_S
    assert pause_s(pauses[-1], lived_s=SETTLED_S) == PAUSE_MIN_S


@pytest.mark.parametrize(
    ("text", "words", "why"),
    [
        ("", (), "cluster.nodes is empty"),
        ("[cluster]\nlisten = '127.0.0.1:1'\nnodes = ['a']", ("--run-dir", "x"), "must be a whole path"),
    ],
)
def test_wrong_use_is_one_line_with_the_remedy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: tuple[str, ...], why: str
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["cluster", "up", "--config", str(config), *words])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert why in err
