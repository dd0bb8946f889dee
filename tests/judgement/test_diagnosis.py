"""What most likely went wrong: incident A as it was, and each cause from its own evidence."""

import json
import random
from pathlib import Path

import pytest

from judgement.curves import climb, healthy, incident_a, shares
from stepguardd.cli import main
from stepguardd.core.diagnosis import ADVICE, NAMES, Cause, Evidence, Fact, rank
from stepguardd.core.reward import RewardConfig
from stepguardd.diagnosis.case import Case, CaseError, investigate
from stepguardd.diagnosis.report import as_json, as_markdown


def columns(path: Path, **named: list) -> Path:
    names = list(named)
    rows = (
        f"{i}," + ",".join("" if cell is None else f"{cell}" for cell in cells)
        for i, cells in enumerate(zip(*named.values(), strict=True))
    )
    path.write_text(f"step,{','.join(names)}\n" + "\n".join(rows) + "\n")
    return path


def case_of(*paths: Path, at: int | None = None) -> Case:
    return investigate(paths, RewardConfig(), at=at)


def test_incident_a_is_reconstructed(tmp_path: Path) -> None:
    """A dead server, scored as zeros; then a server with the base weights; and no sign of memory trouble."""
    values = incident_a()
    rng = random.Random(1)
    columns(
        tmp_path / "metrics.csv",
        reward=values,
        gpu_memory_percent=[rng.uniform(95.0, 96.0) for _ in values],
        grad_norm=[rng.uniform(0.1, 0.2) for _ in values],
    )
    log = [f"2026-11-20 10:{i // 60:02}:{i % 60:02} step {i}: weights update successful" for i in range(800)]
    (tmp_path / "trainer.log").write_text("\n".join(log) + "\n")
    case = case_of(tmp_path)
    answer = as_json(case)
    assert list(answer) == ["onset_step", "garbage_steps", "hypotheses", "actions", "advice"]
    assert (answer["onset_step"], answer["garbage_steps"]) == (188, 492)
    first, second = case.hypotheses[:2]
    assert first.cause is Cause.SERVER_CRASH
    assert first.confidence > 0.9
    assert second.cause is Cause.STALE_WEIGHTS
    assert any("0.4" in line and "base model" in line for line in second.supporting)
    report = as_markdown(case)
    assert "492 steps trained on nothing" in report
    assert "stale base weights" in report
    assert max(map(len, report.splitlines())) <= 80
    causes = {hypothesis.cause: hypothesis for hypothesis in case.hypotheses}
    assert causes[Cause.GPU_OOM].confidence < 0.1
    assert any("no out-of-memory line in 800 lines" in line for line in causes[Cause.GPU_OOM].opposing)
    assert any("flat" in line for line in causes[Cause.GPU_OOM].opposing)


def test_incident_a_needs_no_more_than_its_curve(tmp_path: Path) -> None:
    case = case_of(columns(tmp_path / "a.csv", reward=incident_a()))
    assert [h.cause for h in case.hypotheses[:2]] == [Cause.SERVER_CRASH, Cause.STALE_WEIGHTS]
    assert (case.onset_step, case.garbage_steps) == (188, 492)


# ruff: noqa: E501 - whole lines of logs
LINES = {
    Cause.SERVER_CRASH: "[2026-11-20 10:00:00] Subprocess scheduler_0 (pid=42) crashed with exit code -9. Triggering",
    Cause.SERVER_HANG: "[2026-11-20 10:00:00] Scheduler watchdog timeout (self.watchdog_timeout=300, self.soft=False)",
    Cause.HOST_OOM: "[123.4] Memory cgroup out of memory: Killed process 42 (python) total-vm:9kB, anon-rss:8kB",
    Cause.GPU_OOM: "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has a total",
    Cause.KV_EXHAUSTION: "KV cache pool is full. Retract requests. #retracted_reqs: 3, #new_token_ratio: 0.6 -> 0.9",
    Cause.GPU_FAULT: "NVRM: Xid (PCI:0000:3b:00): 79, pid=42, name=python, GPU has fallen off the bus.",
    Cause.NETWORK: "NCCL error in: ProcessGroupNCCL.cpp:94, ncclSystemError: System call failed",
    Cause.REWARD_FUNCTION: "2026-11-20 10:00:00 reward_fn: exception in grader: KeyError 'answer'",
    Cause.NAN_WEIGHTS: "2026-11-20 10:00:00 step 188 loss: nan grad_norm: nan",
    Cause.DATA_FAULT: "2026-11-20 10:00:00 dataset shard 3: checksum error, corrupt record",
    Cause.DISK_FULL: "OSError: [Errno 28] No space left on device: '/ckpt/step_188/model.safetensors'",
    Cause.TRAINER_HANG: "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE,",
    Cause.STALE_WEIGHTS: "2026-11-20 10:00:00 update_weights_from_distributed failed: 500",
}


@pytest.mark.parametrize("cause", LINES, ids=str)
def test_a_log_line_names_its_cause(tmp_path: Path, cause: Cause) -> None:
    path = tmp_path / "some.log"
    path.write_text(f"nothing here\n{LINES[cause]}\nnor here\n")
    case = case_of(path)
    assert case.hypotheses[0].cause is cause
    assert any("some.log:2" in line for line in case.hypotheses[0].supporting)


def reward_of(kind: str, rng: random.Random) -> dict[str, list]:
    good = healthy(3)
    match kind:
        case "stale":
            good = shares(rng, 32, [0.35] * 10 + climb(190, 0.35, 0.8))
            return {"reward": [*good, *shares(rng, 32, [0.35] * 40)]}
        case "decay":
            bad = shares(rng, 32, [0.7 * (1 - i / 40) for i in range(1, 41)])
            entropy = [rng.uniform(0.9, 1.0) for _ in good] + [0.9 - 0.02 * i for i in range(40)]
            return {"reward": [*good, *bad], "entropy": entropy, "response/aborted_ratio": [0.0] * 240}
        case "grader":
            length = [rng.uniform(400, 420) for _ in range(230)]
            return {
                "reward": [*good, *[0.0] * 30],
                "response_length/mean": length,
                "response/aborted_ratio": [0.0] * 230,
            }
        case "nan":
            loss = [0.1] * 200 + [float("nan")] * 30
            return {"reward": [*good, *[float("nan")] * 30], "loss": loss}
        case "stuck":
            return {"reward": [*good, *[good[-1]] * 40]}
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("stale", Cause.STALE_WEIGHTS),
        ("decay", Cause.POLICY_COLLAPSE),
        ("grader", Cause.REWARD_FUNCTION),
        ("nan", Cause.NAN_WEIGHTS),
        ("stuck", Cause.REWARD_FUNCTION),
    ],
)
def test_a_curve_names_its_cause(tmp_path: Path, kind: str, cause: Cause) -> None:
    case = case_of(columns(tmp_path / "a.csv", **reward_of(kind, random.Random(4))))
    assert case.hypotheses[0].cause is cause, case.hypotheses


def test_every_line_says_when_where_and_how_much(tmp_path: Path) -> None:
    columns(tmp_path / "a.csv", reward=incident_a())
    (tmp_path / "b.log").write_text(LINES[Cause.SERVER_CRASH] + "\n")
    for hypothesis in case_of(tmp_path).hypotheses:
        for line in (*hypothesis.supporting, *hypothesis.opposing):
            time, rest = line.split(", ", 1)
            assert time.startswith(("step ", "2026-", "whole log")), line
            assert ": " in rest, line
            assert any(character.isdigit() for character in rest) or "once" in rest, line


def test_a_step_can_be_asked_about(tmp_path: Path) -> None:
    values = [*healthy(5), 0.0, *healthy(6)[-60:], *[0.0] * 20]
    path = columns(tmp_path / "a.csv", reward=values)
    assert case_of(path).onset_step == 200
    assert case_of(path, at=270).onset_step == 261
    assert case_of(path, at=100).onset_step is None


def test_a_healthy_run_has_nothing_to_explain(tmp_path: Path) -> None:
    columns(tmp_path / "a.csv", reward=healthy(7))
    (tmp_path / "a.log").write_text("all is well\n")
    case = case_of(tmp_path)
    assert case.hypotheses == ()
    assert "nothing wrong was found" in as_markdown(case)


def test_what_cannot_be_read_is_said_and_other_files_are_passed_over(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match="no such file"):
        case_of(tmp_path / "none")
    with pytest.raises(CaseError, match="no recorded metrics"):
        case_of(tmp_path)
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    columns(tmp_path / "a.csv", reward=healthy(8))
    assert case_of(tmp_path).read == [f"{tmp_path / 'a.csv'}: 200 steps of reward"]
    with pytest.raises(CaseError, match=r"notes\.csv"):
        case_of(tmp_path / "notes.csv")


def test_every_cause_has_a_name_and_advice_and_can_be_reached() -> None:
    assert set(NAMES) == set(ADVICE) == set(Cause)
    reached = set()
    for fact in Fact:
        piece = Evidence(fact=fact, time="step 1", source="a test", text="1")
        reached |= {hypothesis.cause for hypothesis in rank([piece])}
    assert reached == set(Cause)
    assert rank([]) == ()


def test_more_of_the_same_fact_weighs_once_and_is_listed() -> None:
    pieces = [
        Evidence(fact=Fact.SERVER_CRASHED, time=f"step {i}", source="a test", text=f"{i}") for i in range(3)
    ]
    (one,), (three,) = (
        [h for h in rank(some) if h.cause is Cause.SERVER_CRASH] for some in (pieces[:1], pieces)
    )
    assert one.confidence == three.confidence
    assert len(three.supporting) == 3


def test_the_command_prints_a_report_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = columns(tmp_path / "a.csv", reward=incident_a())
    with pytest.raises(SystemExit) as left:
        main(["diagnose", str(path), "--json"])
    assert left.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["hypotheses"][0]["cause"] == "server_crash"
    assert set(answer["hypotheses"][0]) == {"cause", "confidence", "for", "against"}
    page = tmp_path / "report.html"
    with pytest.raises(SystemExit) as left:
        main(["diagnose", str(path), "--html", str(page)])
    assert left.value.code == 0
    assert "492 steps trained on nothing" in page.read_text()
    assert "492 steps trained on nothing" in " ".join(capsys.readouterr().out.split())


def saved(root: Path, *steps: int, bad: int | None = None) -> None:
    """Checkpoints as Hugging Face's Trainer writes them; the weights of one are not finite."""
    import torch
    from safetensors.torch import save_file

    for step in steps:
        folder = root / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        weights = torch.ones(8, 8)
        if step == bad:
            weights[3, 3] = float("nan")
        save_file({"model.weight": weights}, folder / "model.safetensors")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))


def test_a_checkpoint_that_is_not_finite_is_evidence_for_nan_weights(tmp_path: Path) -> None:
    values = [*healthy(3), *[float("nan")] * 30]
    columns(tmp_path / "metrics.csv", reward=values)
    saved(tmp_path / "checkpoints", 100, 200, 220, bad=220)
    case = case_of(tmp_path)
    first = case.hypotheses[0]
    assert first.cause is Cause.NAN_WEIGHTS
    assert first.confidence > 0.9
    line = next(line for line in first.supporting if "checkpoint-220" in line)
    assert line.startswith("step 220, checkpoint-220: ")
    assert "model.weight" in line
    assert [read.rpartition(": ")[2] for read in case.read if "checkpoint-" in read] == ["good", "bad"]
    assert any("stepguard checkpoints" in advice for advice in case.advice)


def test_checkpoints_alone_are_looked_at_and_good_ones_are_no_evidence(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20)
    case = case_of(tmp_path)
    assert case.hypotheses == ()
    assert len(case.read) == 2
    saved(tmp_path, 30, bad=30)
    case = case_of(tmp_path)
    assert [hypothesis.cause for hypothesis in case.hypotheses] == [Cause.NAN_WEIGHTS]
    assert "No reward was found to go by" in case.summary


def test_logs_that_speak_of_trouble_are_in_the_summary_of_a_run_whose_reward_is_well(tmp_path: Path) -> None:
    columns(tmp_path / "a.csv", reward=healthy(7))
    (tmp_path / "s.log").write_text(f"{LINES[Cause.SERVER_CRASH]}\n")
    report = " ".join(as_markdown(case_of(tmp_path)).split())
    assert "shows no incident, but something else speaks of trouble: 2026-11-20 10:00:00, s.log:1" in report
    assert "Nothing was found" not in report


def test_what_stepguard_did_itself_is_told_from_its_reports(tmp_path: Path) -> None:
    columns(tmp_path / "a.csv", reward=healthy(7))
    folder = tmp_path / "state" / "incidents" / "3"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"incident": 3, "summary": "It was held."}))
    (folder.parent / "4").mkdir()
    (folder.parent / "4" / "report.json").write_text("cut sho")
    assert case_of(tmp_path).actions == [f"incident 3: It was held; see {folder / 'report.md'}"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}", "--at", "-3"], "--at"),
        (["{run}", "--metric", "nope"], "no metric 'nope'"),
        (["{run}/none"], "no such file or folder"),
        (["{run}/empty.csv"], "empty"),
        (["{run}/bad.csv"], "bad.csv"),
        (["{run}", "--html", "{run}/none/x.html"], "No such file or directory"),
        (["{run}", "--config", "{run}/none.toml"], "none.toml"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    columns(tmp_path / "a.csv", reward=healthy(7))
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "bad.csv").write_text("step,reward\nx,1\n")
    with pytest.raises(SystemExit) as left:
        main(["diagnose", *(argument.format(run=tmp_path) for argument in arguments)])
    out, err = capsys.readouterr()
    assert (left.value.code, out, err.count("\n")) == (2, "", 1)
    assert words in err


def test_gradients_that_are_no_numbers_are_no_fault_of_the_reward_function() -> None:
    """Ruined weights answer every prompt, and every answer scores the same."""
    facts = (Fact.LOSS_NOT_FINITE, Fact.COMPLETE, Fact.SAME_SCORES)
    ranked = rank([Evidence(fact=fact, time="step 1", source="a test", text="1") for fact in facts])
    assert ranked[0].cause is Cause.NAN_WEIGHTS
    assert all(one.confidence < 0.5 for one in ranked[1:])
