"""The status on a terminal: one screen whatever the daemon says, the worst first, nothing executed."""

import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from shell.fake_daemon import WELL
from stepguardd.cli.status_view import is_well, view
from stepguardd.sparkline import sparkline


def drawn(status: Any) -> list[str]:
    screen = Console(file=io.StringIO(), width=80, height=24, force_terminal=False, highlight=False)
    screen.print(view(status))
    return screen.file.getvalue().splitlines()  # type: ignore[attr-defined]


def in_phase(phase: str, **more: Any) -> dict[str, Any]:
    return {**WELL, "breaker": {"phase": phase, "since_s": 12.0, "reason": "server_exited"}, **more}


WORST: dict[str, Any] = {
    **in_phase("locked_out"),
    "run": "a-very-long-name-" * 10,
    "servers": [
        {
            "name": f"server-with-a-long-name-{i}",
            "stage": "weights",
            "state": state,
            "since_s": 1e9,
            "pid": 10**9,
            "restarts": 10**9,
        }
        for i in range(100)
        for state in ("serving", "dead", "restarting")
    ],
    "incident": {
        "id": 10**12,
        "cause": "c" * 100,
        "onset_step": 10**15,
        "opened_s": 1e9,
        "stage": "s" * 100,
        "actions": ["did " * 100] * 50,
        "known_to": "somebody " * 40,
    },
    "gpus": [{"index": i, "used_bytes": 79 << 30, "total_bytes": 80 << 30} for i in range(64)],
    "unseen": {f"source {i} " * 9: "for a reason " * 9 for i in range(30)},
    "host": {
        "available_bytes": 1 << 30,
        "total_bytes": 2 << 40,
        "oom_kills": 10**9,
        "pressure": {"some_10s": 99.5, "full_10s": 80.0, "short": True},
    },
    "oom": {
        "kernel": {"count": 10**9, "newest": {"server": "s" * 90, "used_bytes": 1 << 40, "age_s": 1e9}},
        **{source: {"count": None, "newest": None} for source in ("ray", "cuda", "kv_pool")},
    },
    "logs": [
        {"server": f"s{i}" * 40, "path": "/p" * 90, "trouble": "t" * 90, "sign": "disk_full", "age_s": i}
        for i in range(64)
    ],
    "stream": {"path": "/p" * 90, "metric": "m" * 90, "step": 10**12, "reward": "NaN", "age_s": 1e9},
    "checkpoints": [{"step": 10**9, "proven": True}],
    "nodes": [
        {"name": f"n{i}" * 40, "state": state, "since_s": 1e9, "why": "silent " * 30}
        for i in range(50)
        for state in ("lost", "joining")
    ],
    "prompts": {
        "crashes": 10**9,
        "suspected": 10**9,
        "suspects": ["p" * 90] * 16,
        "withheld": 10**9,
        "quarantine": ["q" * 90] * 16,
    },
    "rewards": [i / 60 for i in range(60)],
    "warnings": ["beware " * 100] * 50,
    "refused_batches": 10**9,
}


def test_the_worst_case_fits_one_screen() -> None:
    lines = drawn(WORST)
    assert len(lines) < 24, "the prompt needs a line, too"
    assert max(map(len, lines)) <= 80
    assert any("and 297 more, 100 of them serving" in line for line in lines)


def test_what_is_unseen_is_named_while_nothing_is_wrong() -> None:
    unseen = {"/metrics": "not offered by s", "GPUs": "no driver"}
    assert "Unseen   /metrics, GPUs" in [line.rstrip() for line in drawn({**WELL, "unseen": unseen})]
    assert not any("Unseen" in line for line in drawn(WELL))
    assert not any("Unseen" in line for line in drawn(WORST))
    assert len(drawn({**WORST, "incident": None})) < 24


def test_prompts_that_kill_the_server_have_their_line() -> None:
    hunt = {"crashes": 2, "suspected": 8, "suspects": ["p3", "p4", "p5"], "withheld": 0, "quarantine": []}
    found = {"crashes": 0, "suspected": 0, "suspects": [], "withheld": 1, "quarantine": ["p3"]}
    for prompts, line in (
        (hunt, "Prompts  8 suspects after 2 crashes: p3, p4 …"),
        (found, "Prompts  1 withheld: p3"),
        (
            {**hunt, "withheld": 1, "quarantine": ["p9"]},
            "Prompts  1 withheld; 8 suspects after 2 crashes: p3, p4 …",
        ),
    ):
        assert any(line in shown for shown in drawn({**WELL, "prompts": prompts})), prompts
    assert not any("Prompts" in shown for shown in drawn({**WELL, "prompts": None}))


def test_the_worst_servers_are_shown_first() -> None:
    lines = drawn(WORST)
    head = next(index for index, line in enumerate(lines) if line.startswith("Server"))
    assert all(" dead, weights " in line for line in lines[head + 1 : head + 4])


@pytest.mark.parametrize(
    ("status", "word", "advice"),
    [
        (in_phase("closed"), "GOING", "Nothing."),
        (in_phase("half_open"), "ON PROBATION", "under watch"),
        (in_phase("shadow"), "WATCHED ONLY", "Nothing is held in this mode"),
        (in_phase("open"), "HELD", "Stepguard is repairing it"),
        (in_phase("open", mode="hold"), "HELD", "stepguard restart-server"),
        (in_phase("forced_open"), "PAUSED BY A PERSON", "stepguard resume"),
        (in_phase("locked_out"), "LOCKED OUT", "stepguard rollback"),
        (in_phase("quantum"), "QUANTUM", "newer than this command"),
        (in_phase("closed", trainer={"alive": False}), "GOING", "The trainer is gone"),
    ],
)
def test_each_phase_has_its_word_and_its_advice(status: dict[str, Any], word: str, advice: str) -> None:
    lines = drawn(status)
    assert word in lines[0]
    assert advice in " ".join(lines[-2:])


def test_the_last_incident_is_told_when_none_is_open() -> None:
    last = {
        "id": 7,
        "cause": "server_exited",
        "opened_s": 90.0,
        "stage": "closed",
        "actions": ["restarted it"],
    }
    text = "\n".join(drawn({**WELL, "last_incident": last}))
    assert "Last incident 7: server_exited, 1 min 30 s ago, closed\n- restarted it" in text.replace("  ", "")


def test_who_did_it_and_why_are_shown_without_numbers_and_codes() -> None:
    """The line is 80 wide: a reason code's underscores and a process's number would push the reason out."""
    paused = {"phase": "forced_open", "since_s": 5, "reason": "paused by ada (uid 1000, pid 12704): a look"}
    incident = {"id": 1, "cause": "server_died", "actions": ["held: server_died at step 3"], "stage": "held"}
    text = "\n".join(drawn({**WELL, "breaker": paused, "gate": {"order": "HOLD"}, "incident": incident}))
    assert "gate HOLD: paused by ada: a look" in text
    assert "Incident 1: server died, " in text
    assert "- held: server died at step 3" in text


def test_gpus_and_host_are_one_line_each_with_what_is_wrong() -> None:
    gpus = [
        {"index": 0, "used_bytes": 40 << 30, "total_bytes": 80 << 30},
        {"index": 1, "used_bytes": None, "total_bytes": None, "lost": True},
    ]
    host = {"available_bytes": 12 << 30, "total_bytes": 100 << 30, "oom_kills": 2}
    text = "\n".join(drawn({**WELL, "gpus": gpus, "host": host}))
    assert "2, memory 50%, 1 lost" in text
    assert "12 of 100 GiB of memory available, pressure unknown" in text
    unknown = "\n".join(drawn({**WELL, "gpus": [{}], "host": {"available_bytes": None}}))
    assert unknown.count("memory unknown") == 2


def line_of(title: str, status: Any) -> str:
    (found,) = [line for line in drawn(status) if line.startswith(title)]
    return " ".join(found.split())


def test_each_source_of_out_of_memory_is_counted_apart_and_the_newest_is_named() -> None:
    """What cannot be seen is no 0."""
    sources = {
        "kernel": {"count": None, "newest": None},
        "ray": {"count": 0, "newest": None},
        "cuda": {"count": 2, "newest": {"kind": "cuda_run", "server": "left", "age_s": 90.0}},
        "kv_pool": {"count": 7, "newest": {"kind": "kv_full", "role": "server", "age_s": 300.0}},
    }
    said = line_of("OOM", {**WELL, "oom": sources})
    assert said == "OOM kernel ?, Ray 0, CUDA 2, KV pool 7; CUDA 1 min 30 s ago: left"
    nothing = {source: {"count": 0, "newest": None} for source in sources}
    assert line_of("OOM", {**WELL, "oom": nothing}) == "OOM kernel 0, Ray 0, CUDA 0, KV pool 0"


def test_the_logs_the_stream_and_the_pressure_have_their_lines() -> None:
    """How many are read, what the newest line meant, how new the newest step is."""
    log = {"server": "left", "path": "/l", "trouble": None, "lines": 3, "dropped_bytes": 0}
    logs = [{**log, "sign": "disk_full", "age_s": 4.0}, {**log, "server": None, "trouble": "not there yet"}]
    assert line_of("Logs", {**WELL, "logs": logs}) == "Logs 1 of 2 followed; 4.0 s ago left: disk full"
    assert line_of("Logs", {**WELL, "logs": [log]}) == "Logs 1 of 1 followed"
    assert line_of("Logs", {**WELL, "logs": [{**log, "dropped_bytes": 3 << 20}]}).endswith(
        "3 MiB came too fast"
    )
    stream = {
        "path": "/w",
        "metric": "train/reward",
        "step": 7,
        "reward": 0.25,
        "age_s": 2.0,
        "trouble": None,
    }
    assert line_of("Stream", {**WELL, "stream": stream}) == "Stream train/reward, step 7: 0.25, 2.0 s ago"
    assert line_of("Stream", {**WELL, "stream": {"path": "/w/wandb"}}) == "Stream no step yet in wandb"
    assert line_of("Stream", {**WELL, "stream": {**stream, "trouble": "/w: gone"}}) == "Stream w: gone"
    pressure = {"some_10s": 37.5, "full_10s": 1.0, "short": True}
    host = {"available_bytes": 12 << 30, "total_bytes": 100 << 30, "pressure": pressure}
    assert line_of("Host", {**WELL, "host": host}).endswith("available, waited for 38 % of the last 10 s")


def test_other_machines_are_counted_and_those_that_are_not_there_named() -> None:
    here = {"name": "n1", "state": "present", "since_s": 9.0, "why": ""}
    lost = {"name": "n2", "state": "lost", "since_s": 12.0, "why": "its agent is gone"}
    joining = {"name": "n3", "state": "joining", "since_s": 3.0, "why": ""}
    assert line_of("Machines", {**WELL, "nodes": [here, here]}) == "Machines 2 of 2 others are there"
    line = line_of("Machines", {**WELL, "nodes": [here, lost]})
    assert line == "Machines 1 of 2 others are there; n2 lost for 12 s: its agent is gone"
    line = line_of("Machines", {**WELL, "nodes": [here, joining, lost]})
    assert line == "Machines 1 of 3 others are there; n2 lost for 12 s, 1 more away"


def test_where_the_screen_is_full_what_is_wrong_stays() -> None:
    """The incident and its servers take the room; nothing bad to say is said elsewhere: --json."""
    quiet = {source: {"count": 0, "newest": None} for source in ("kernel", "ray", "cuda", "kv_pool")}
    bad = {**quiet, "kernel": {"count": 1, "newest": None}}
    titles = {line.split()[0] for line in drawn({**WORST, "nodes": [], "oom": bad}) if line.strip()}
    assert {"Breaker", "Trainer", "Reward", "OOM"} <= titles
    assert "OOM" not in {line.split()[0] for line in drawn({**WORST, "oom": quiet}) if line.strip()}


def test_an_incident_names_its_report_and_who_has_it_in_hand() -> None:
    incident = {"id": 7, "cause": "c", "opened_s": 1.0, "stage": "held", "known_to": "ada: draining it"}
    text = " ".join("\n".join(drawn({**in_phase("open"), "incident": incident})).split())
    assert "in hand: ada: draining it" in text
    assert "stepguard report 7" in text


def test_well_means_that_nothing_is_held_or_dead() -> None:
    assert [is_well(in_phase(phase)) for phase in ("closed", "half_open", "shadow")] == [True] * 3
    assert not any(is_well(in_phase(phase)) for phase in ("open", "forced_open", "locked_out", "quantum"))
    assert not is_well(in_phase("closed", trainer={"alive": False}))
    assert is_well(in_phase("closed", trainer={"alive": None}))
    assert not is_well(in_phase("closed", servers=[{"name": "a", "state": "dead"}]))
    assert not is_well({})


def test_text_from_outside_is_shown_and_never_obeyed() -> None:
    """No terminal escapes, no markup, no second line."""
    lines = drawn({**WELL, "run": "\x1b[31mred\n[bold]x", "warnings": ["[link=file:///etc]\x07 a\nb"]})
    text = "\n".join(lines)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]x" in lines[0]
    assert "warning: [link=file:///etc]\\x07 a b" in text


def test_a_sparkline_shows_level_gap_and_constancy() -> None:
    assert sparkline([0.0, None, 1.0]) == "▁·█"
    assert sparkline([0.5, 0.5]) == "▅▅"
    assert sparkline([None, None]) == "··"
    assert sparkline([]) == ""


@settings(max_examples=100, deadline=None)
@given(st.lists(st.none() | st.floats(-1e9, 1e9), max_size=70))
def test_a_sparkline_has_one_character_a_value(values: list[float | None]) -> None:
    assert len(sparkline(values)) == len(values)


ANY_JSON = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=90)


@settings(max_examples=75, deadline=None)
@given(
    status=st.fixed_dictionaries(
        {},
        optional={
            "run": ANY_JSON,
            "mode": ANY_JSON,
            "uptime_s": st.none() | st.floats(0, 1e12),
            "breaker": st.fixed_dictionaries(
                {}, optional={"phase": st.text(max_size=30), "reason": ANY_JSON}
            ),
            "gate": st.fixed_dictionaries({}, optional={"order": ANY_JSON, "generation": ANY_JSON}),
            "trainer": st.fixed_dictionaries(
                {},
                optional={
                    "alive": st.none() | st.booleans(),
                    "step": ANY_JSON,
                    "phase": ANY_JSON,
                    "reward": st.none() | st.floats(allow_nan=False),
                    "beat_age_s": st.none() | st.floats(allow_nan=False),
                },
            ),
            "servers": st.lists(
                st.fixed_dictionaries(
                    {}, optional={"name": ANY_JSON, "state": st.text(max_size=20), "pid": ANY_JSON}
                ),
                max_size=8,
            ),
            "incident": st.none()
            | st.fixed_dictionaries({"actions": st.lists(st.text(max_size=90), max_size=9)}),
            "gpus": st.none()
            | st.lists(
                st.fixed_dictionaries(
                    {}, optional={"index": ANY_JSON, "used_bytes": ANY_JSON, "total_bytes": ANY_JSON}
                ),
                max_size=20,
            ),
            "nodes": st.lists(
                st.fixed_dictionaries(
                    {}, optional={"name": ANY_JSON, "state": st.text(max_size=20), "why": ANY_JSON}
                ),
                max_size=5,
            ),
            "host": st.none()
            | st.fixed_dictionaries({}, optional={"available_bytes": ANY_JSON, "total_bytes": ANY_JSON}),
            "oom": st.dictionaries(
                st.text(max_size=9),
                st.fixed_dictionaries(
                    {},
                    optional={
                        "count": st.none() | st.integers(0),
                        "newest": st.none()
                        | st.fixed_dictionaries({}, optional={"server": ANY_JSON, "age_s": ANY_JSON}),
                    },
                ),
                max_size=5,
            ),
            "logs": st.lists(
                st.fixed_dictionaries(
                    {},
                    optional={
                        "server": ANY_JSON,
                        "trouble": ANY_JSON,
                        "sign": ANY_JSON,
                        "age_s": ANY_JSON,
                        "dropped_bytes": ANY_JSON,
                    },
                ),
                max_size=5,
            ),
            "stream": st.none()
            | st.fixed_dictionaries(
                {},
                optional={
                    "path": ANY_JSON,
                    "metric": ANY_JSON,
                    "step": ANY_JSON,
                    "reward": ANY_JSON,
                    "age_s": ANY_JSON,
                    "trouble": ANY_JSON,
                },
            ),
            "prompts": st.none()
            | st.fixed_dictionaries(
                {},
                optional={
                    "crashes": ANY_JSON,
                    "suspected": st.integers(0),
                    "suspects": st.lists(st.text(max_size=60), max_size=16),
                    "withheld": st.integers(0),
                    "quarantine": st.lists(st.text(max_size=60), max_size=16),
                },
            ),
            "rewards": st.lists(st.none() | st.floats(-1e6, 1e6), max_size=70),
            "warnings": st.lists(st.text(max_size=90), max_size=5),
        },
    )
)
def test_any_answer_is_drawn_on_one_screen(status: Any) -> None:
    lines = drawn(status)
    assert len(lines) <= 24
    assert all(cell_len(line) <= 80 for line in lines)
