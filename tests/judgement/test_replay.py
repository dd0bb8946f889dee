"""Recorded runs: read strictly, judged like live ones, told in one fixed shape."""

import json
import math
import random
from pathlib import Path

import pytest

from judgement.curves import healthy, incident_a, shares
from senses.event_writer import scalar_event, write_events
from senses.wandb_writer import WandbWriter
from stepguardd.cli import main
from stepguardd.core.reward import RewardConfig
from stepguardd.history import HistoryError, read_history
from stepguardd.replay import as_json, replay

KEYS = [
    "source",
    "metric",
    "steps",
    "first_step",
    "last_step",
    "unknown",
    "trips",
    "warnings",
    "garbage_steps_avoided",
]


def written(path: Path, values: list[float | None], first: int = 0) -> Path:
    rows = (f"{first + i},{'' if v is None else v}" for i, v in enumerate(values))
    path.write_text("step,reward\n" + "\n".join(rows) + "\n")
    return path


def replayed(path: Path, **config: float) -> dict:
    return as_json(replay(RewardConfig(**config), read_history(path)))


def stepguard(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, out, err


def test_incident_a_trips_once_and_stays_open(tmp_path: Path) -> None:
    result = replayed(written(tmp_path / "a.csv", incident_a()))
    assert list(result) == KEYS
    assert (result["steps"], result["first_step"], result["last_step"], result["unknown"]) == (800, 0, 799, 0)
    (trip,) = result["trips"]
    assert list(trip) == ["step", "onset_step", "reason", "kind", "action", "evidence"]
    assert (trip["step"], trip["onset_step"], trip["kind"]) == (188, 188, "unknown")
    assert result["garbage_steps_avoided"] == 800 - 188
    assert result["warnings"] == []


def test_an_incident_ends_when_the_stream_is_back(tmp_path: Path) -> None:
    values = [*healthy(1), *[0.0] * 30, *shares(random.Random(2), 32, [0.7] * 50), 0.0, 0.71875]
    result = replayed(written(tmp_path / "a.csv", values))
    assert [trip["step"] for trip in result["trips"]] == [200, 280]
    assert result["garbage_steps_avoided"] == 31


def test_a_warning_is_listed_once_at_its_first_step(tmp_path: Path) -> None:
    values = [*healthy(2), *shares(random.Random(2), 32, [0.4] * 100)]
    result = replayed(written(tmp_path / "a.csv", values, first=1000))
    assert result["trips"] == []
    (warning,) = result["warnings"]
    assert 1200 <= warning["step"] <= 1205


def test_all_formats_of_one_run_come_to_the_same(tmp_path: Path) -> None:
    values = [*healthy(3), *[0.0] * 20]
    results = [replayed(written(tmp_path / "a.csv", values))]
    lines = (json.dumps({"step": i, "reward": v, "loss": 0.1}) for i, v in enumerate(values))
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    results.append(replayed(tmp_path / "a.jsonl"))
    lines = (json.dumps({"step": i, "data": {"critic/score/mean": v}}) for i, v in enumerate(values))
    (tmp_path / "verl.jsonl").write_text("\n".join(lines) + "\n")
    results.append(replayed(tmp_path / "verl.jsonl"))
    writer = WandbWriter(tmp_path / "run-abc.wandb")
    for i, value in enumerate(values):
        writer.row(7 * i, {"train/reward": value, "train/global_step": i})
    results.append(replayed(tmp_path / "run-abc.wandb"))
    events = tmp_path / "events.out.tfevents.1700000000.host"
    write_events(events, [scalar_event(i, "reward", value or 0.0) for i, value in enumerate(values)])
    results.append(replayed(events))
    for result in results:
        assert (result["steps"], result["first_step"], result["last_step"]) == (220, 0, 219)
        assert [(trip["step"], trip["reason"]) for trip in result["trips"]] == [(200, "reward_collapse")]


def test_columns_with_other_names_are_second_witnesses(tmp_path: Path) -> None:
    rng = random.Random(4)
    values = [*healthy(4), *shares(rng, 32, [0.35] * 15)]
    failing = [0.0] * 200 + [rng.uniform(0.4, 0.6) for _ in range(15)]
    for column in ("rollout/aborted_ratio", "rollout/failed_fraction", "engine/error_rate"):
        rows = (f"{i},{v},{a}" for i, (v, a) in enumerate(zip(values, failing, strict=True)))
        path = tmp_path / "a.csv"
        path.write_text(f"step,reward,{column}\n" + "\n".join(rows) + "\n")
        result = replayed(path)
        assert result["trips"], column
        assert result["trips"][0]["step"] <= 202
        assert result["trips"][0]["kind"] == "infra"
        assert result["trips"][0]["action"] == "hold_and_repair"


def test_empty_is_unknown_and_nan_is_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("step,reward,timestamp\n0,0.5,1.0\n1,,2.0\n2,what,3.0\n3,nan,4.0\n4,0.5,5.0\n")
    history = read_history(path)
    assert history.values[:3] == [0.5, None, None]
    assert history.values[3] is not None
    assert math.isnan(history.values[3])
    assert history.unknown == 2
    assert [trip["step"] for trip in replayed(path)["trips"]] == [3]


def test_a_torn_last_line_is_unknown_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("step,reward\n0,0.5\n1,0.6\n2")
    assert (len(read_history(path).steps), read_history(path).unknown) == (2, 1)
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 0, "reward": 0.5}\n{"step": 1, "reward": 0.6}\n{"step": 2, "rew')
    assert (len(read_history(path).steps), read_history(path).unknown) == (2, 1)


def test_a_restart_from_an_older_step_is_another_attempt(tmp_path: Path) -> None:
    values = healthy(5)
    steps = [*range(150), *range(100, 150)]
    path = tmp_path / "a.csv"
    path.write_text("step,reward\n" + "".join(f"{s},{v}\n" for s, v in zip(steps, values, strict=True)))
    assert read_history(path).attempts == [0] * 150 + [1] * 50


def test_a_silence_between_rows_is_a_warning_where_a_limit_is_set(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    times = [60 * i + (7200 if i >= 120 else 0) for i in range(200)]
    rows = (f"{i},{v},{t}" for i, (v, t) in enumerate(zip(healthy(6), times, strict=True)))
    path.write_text("step,reward,timestamp\n" + "\n".join(rows) + "\n")
    assert replayed(path)["warnings"] == []
    assert replayed(path, no_step_for_s=600)["warnings"] == [{"step": 120, "reason": "reward_missing"}]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"),
        ("step,reward\n", "no row"),
        ("step,reward\n0,0.5\n2,0.5\n1,0.5\n3,0.5\n", "row 4, column step: step 1 comes after step 2"),
        ("step,reward\n0,0.5\n1,0.5\n1,0.6\n", "row 4, column step: step 1 stands there twice"),
        ("step,reward\n5,0.5\n4,0.5\n3,0.5\n2,0.1\n", "row 3, column step"),
        ("step,reward\n0,0.5\n-3,0.5\n", "row 3, column step: the step -3 is negative"),
        ("step,reward\n0,0.5\n99999999999999999999,0.5\n", "row 3, column step: the step"),
        ("step,reward\n0,0.5\n,0.5\n", "row 3, column step: the step is missing"),
        ("step,reward\n0,0.5\nabc,0.5\n", "row 3, column step: 'abc' is no step"),
        ("step,reward\n0,0.5\n1.5,0.5\n", "row 3, column step"),
        ("step,reward\n0,high\n1,low\n", "column reward: no row holds a number"),
        ("step,loss\n0,0.5\n", "no column is known to be a reward"),
        ("time,reward\n0,0.5\n", "no column for the step"),
        ("0,0.5\n1,0.6\n", "row 1 holds numbers"),
        ("step,reward,reward\n0,0.5,0.5\n", "two columns 'reward'"),
    ],
)
def test_bad_csv_is_refused_with_file_row_and_column(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(HistoryError) as wrong:
        read_history(path)
    assert str(path) in str(wrong.value)
    assert told in str(wrong.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"),
        ("nonsense\nmore\n", "not a metric stream"),
        ('{"step": 0, "reward": 0.5}\n{"reward": 0.5}\n', "row 2, column step: the step is missing"),
        (
            '{"step": 0, "reward": 0.5}\n{"step": "1", "reward": 1}\n{"step": true, "reward": 1}\n',
            "row 3",
        ),
        (
            '{"step": 0, "reward": 0.5}\n{"step": -1, "reward": 0.5}\n',
            "row 2, column step: the step -1 is negative",
        ),
        (
            '{"step": 3, "reward": 0.5}\n{"step": 3, "reward": 0.6}\n',
            "row 2, column step: step 3 stands there twice",
        ),
        ('{"step": 0, "reward": "high"}\n', "column reward"),
    ],
)
def test_bad_json_lines_are_refused_with_file_row_and_column(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(HistoryError) as wrong:
        read_history(path)
    assert str(path) in str(wrong.value)
    assert told in str(wrong.value)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\0\0", b"\0" * 100, b"PK\x03\x04zip"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(HistoryError, match=r"picture\.png"):
        read_history(path)


# --- The command


def test_the_command_prints_one_object_a_file_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = written(tmp_path / "b.csv", incident_a()), written(tmp_path / "a.csv", healthy(7))
    code, out, err = stepguard(capsys, "replay", one, two, "--json")
    assert (code, err) == (0, "")
    first, second = map(json.loads, out.splitlines())
    assert (first["source"], second["source"]) == (str(one), str(two))
    assert (len(first["trips"]), second["trips"]) == (1, [])


def test_wrong_use_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = written(tmp_path / "a.csv", healthy(8)), tmp_path / "bad.csv"
    bad.write_text("step,reward\n0,0.5\nx,1\n")
    for arguments in ([good, bad, "--json"], [tmp_path / "none.csv"], [good, "--metric", "nope"]):
        code, out, err = stepguard(capsys, "replay", *arguments)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1


def test_the_text_fits_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = stepguard(capsys, "replay", written(tmp_path / "a.csv", incident_a()))
    assert "step 188: HOLD reward_collapse" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_page_is_one_file_and_quotes_what_it_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "<img onerror=alert(1)>.csv", incident_a())
    out = tmp_path / "out.html"
    code, _, err = stepguard(capsys, "replay", path, "--html", out)
    assert code == 0, err
    page = out.read_text()
    assert "reward_collapse" in page
    assert "<img onerror" not in page
    assert "<script src" not in page


def test_the_config_is_judged_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "a.csv", healthy(9))
    config = tmp_path / "config.toml"
    config.write_text("[reward]\nmin_reward = 0.6\n")
    _, out, _ = stepguard(capsys, "replay", path, "--config", config, "--json")
    assert json.loads(out)["trips"][0]["reason"] == "min_reward"
    config.write_text("[reward]\nmin_rewards = 0.6\n")
    code, _, _ = stepguard(capsys, "replay", path, "--config", config)
    assert code == 2


# --- tune


def test_tune_keeps_the_defaults_where_they_prove_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "a.csv", healthy(10, steps=600))
    code, out, err = stepguard(capsys, "tune", path, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["reward"] == {
        "rollouts_per_step": 32,
        "false_alarm_steps": 1_000_000,
        "warning_alarm_steps": 20_000,
        "zero_streak_warn": 5,
        "zero_streak_hold": 10,
    }
    assert answer["expected_false_holds_per_million_steps"] == 1.0
    assert answer["bound_95_holds_per_million_steps"] == pytest.approx(5000.0)


def test_tune_says_when_a_run_is_not_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = stepguard(capsys, "tune", written(tmp_path / "a.csv", incident_a()))
    assert code == 1
    assert "step 188" in err
