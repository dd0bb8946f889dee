"""A report tells an incident so that a person can act on it, and gives nothing away that is secret."""

import html
import json
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from daemon_parts.test_journal import Recording, written
from incidents.test_crash_dumps import asked, dump
from stepguardd.cli import main
from stepguardd.core.diagnosis import Cause
from stepguardd.core.events import (
    Answer,
    CallsHung,
    Event,
    GenerationAsked,
    GpuTrouble,
    GpuTroubled,
    LogSeen,
    MemoryPressed,
    OomKind,
    OomSeen,
    RequestsFailed,
    Role,
    SchedulerAsked,
    StepCommitted,
)
from stepguardd.core.reasons import Reason
from stepguardd.core.signs import Sign
from stepguardd.core.state import Settings
from stepguardd.incidents.collected import Collected, LogSpan, read_collected, write_collected
from stepguardd.incidents.folders import folder_of, keep_few, kept
from stepguardd.incidents.markdown import as_markdown, shown_lines
from stepguardd.incidents.page import as_page
from stepguardd.incidents.passage import has_notice
from stepguardd.incidents.report import Report, ReportError, build, without_strangers
from stepguardd.incidents.slices import LogSlice, cut_out, metric_figures
from stepguardd.incidents.writing import write_report
from stepguardd.journal import Journal
from stepguardd.redaction import redacted, redacted_command


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which the server died once, and came back."""
    world = Recording()
    world.steps(12)
    world.kill()
    world.run(30)
    world.steps(6)
    assert world.state.last_incident is not None, "the incident is over"
    home = tmp_path_factory.mktemp("state")
    written(home / "journal.db", world.rows)
    log = home / "server.log"
    log.write_text("[…] The server is fired up\nAuthorization: Bearer abc\n<script>alert(1)</script>\n")
    opened = log.stat().st_size
    with log.open("a") as file:
        file.write("Subprocess scheduler_0 (pid=7) crashed with exit code -9. Triggering\n" + "again\n" * 40)
    collected = Collected(
        run="math",
        incident=1,
        journal=str(home / "journal.db"),
        run_dir="/run/stepguard/math",
        config=(("run.mode", '"act"', True), ("probe.interval_s", "1", False)),
        logs={"s": LogSpan(path=str(log), opened_at=opened)},
    )
    write_collected(folder_of(home, 1), collected)
    (folder_of(home, 1) / "metrics").mkdir()
    for when, value in (("before", 5), ("after", 9)):
        text = f'# HELP x\nsglang:num_queue_reqs{{a="b"}} {value}\nsglang:same 1\n'
        (folder_of(home, 1) / "metrics" / f"s-{when}.txt").write_text(text)
    return home


@pytest.fixture(scope="module")
def report(state_dir: Path) -> Report:
    collected = read_collected(folder_of(state_dir, 1))
    assert collected is not None
    return write_report(collected, folder_of(state_dir, 1))


def test_it_names_the_cause_first_with_evidence_from_the_journal_and_the_log(report: Report) -> None:
    first = report.hypotheses[0]
    assert first.cause is Cause.SERVER_CRASH
    assert first.confidence > 0.9
    assert any("ended" in line for line in first.supporting)
    assert any("s:4" in line for line in first.supporting), "the log's line, with its number"


def test_it_tells_what_happened_in_order_across_the_planes(report: Report) -> None:
    times = [moment.after_s for moment in report.moments]
    assert times == sorted(times)
    assert {"trainer", "server", "stepguard"} <= {moment.plane.value for moment in report.moments}
    told = [moment.text for moment in report.moments]
    order = [
        next(at for at, text in enumerate(told) if part in text)
        for part in ("taken, reward", "ended", "held: server died", "start of s done", "well again")
    ]
    assert order == sorted(order)


def test_the_prompts_that_a_server_died_under_are_in_the_summary(
    state_dir: Path, report: Report, tmp_path: Path
) -> None:
    collected = read_collected(folder_of(state_dir, 1))
    assert collected is not None
    dump(tmp_path, report.opened_wall, asked([10, 999, 11]))
    collected = replace(collected, crash_dumps={"s": str(tmp_path)})
    write_collected(tmp_path, collected)
    again = read_collected(tmp_path)
    assert again == collected
    last = build(collected, None).summary[-1]
    assert "1 prompt was in flight: ids 10 999 11" in last


def test_it_counts_the_cost_from_the_journal(report: Report) -> None:
    incident, cost = report.incident, report.cost
    assert incident.resumed_at is not None
    assert cost.held_s == pytest.approx(incident.resumed_at - incident.opened_at)
    assert cost.garbage_steps == 0
    assert cost.gpu_hours is None or cost.gpus


def test_its_actions_have_durations_and_outcomes(report: Report) -> None:
    assert [action.name.partition(" ")[0] for action in report.actions][:2] == ["stop", "start"]
    assert all(action.ok and action.took_s is not None and action.took_s >= 0 for action in report.actions)


def test_the_markdown_can_be_acted_on(report: Report) -> None:
    text = as_markdown(report)
    assert text.startswith("# Incident 1: the inference server crashed")
    for part in (
        "## What to do",
        "## What happened",
        "## Why, most likely",
        "## What Stepguard did",
        "## What it cost",
        "stepguard status --run-dir /run/stepguard/math",
        "stepguard replay decisions.jsonl",
        'run.mode = "act"',
        "sglang:num_queue_reqs",
        "here the run was held",
    ):
        assert part in text
    assert "sglang:same" not in text
    assert "[40 times]" in text


def test_nothing_secret_and_no_markup_gets_into_it(report: Report, state_dir: Path) -> None:
    folder = folder_of(state_dir, 1)
    for file in folder.rglob("*"):
        if file.is_file():
            assert "Bearer abc" not in file.read_text(), file
    page = (folder / "report.html").read_text()
    body = page[page.index("<body>") :]
    assert "<script>alert" not in body
    assert html.escape("<script>alert(1)</script>") in body
    assert not re.findall(r'<(?:link|img|script)[^>]+(?:src|href)="(?!data:)', body), "nothing is fetched"
    assert "<script" not in page, "a page without a script can be opened anywhere"
    assert len(page) < 100_000, "small enough for a mail or a ticket"


def test_the_folder_has_everything_that_the_report_names(report: Report, state_dir: Path) -> None:
    folder = folder_of(state_dir, 1)
    for name in ("report.md", "report.html", "report.json", "decisions.jsonl", "config.toml", "logs/s.log"):
        assert (folder / name).stat().st_size > 0, name
    told = json.loads((folder / "report.json").read_text())
    assert told["hypotheses"][0]["cause"] == "server_crash"
    assert told["stage"] == report.stage == "closed"
    assert not list(folder.rglob(".*")), "no half-written file is left"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["report", *arguments])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def test_the_command_shows_lists_and_refuses(
    report: Report, state_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = ["--state-dir", str(state_dir)]
    assert run(*home) == 0
    assert capsys.readouterr().out.startswith("# Incident 1: ")
    assert run("1", "--json", *home) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["incident"], told["folder"]) == (1, str(folder_of(state_dir, 1)))
    assert run("--list", *home) == 0
    assert capsys.readouterr().out.strip().startswith("1  closed")
    assert run("7", *home) == 2
    assert "there is no incident 7; there is 1" in capsys.readouterr().err
    assert run("--state-dir", str(state_dir / "nowhere")) == 2
    assert "no journal" in capsys.readouterr().err


def test_a_report_is_made_of_the_journal_alone(
    state_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "journal.db").write_bytes((state_dir / "journal.db").read_bytes())
    assert run("--state-dir", str(tmp_path)) == 0
    assert "the inference server crashed" in capsys.readouterr().out


def test_a_journal_without_incidents_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Journal(tmp_path / "journal.db", boot_id="a")):
        pass
    assert run("--state-dir", str(tmp_path)) == 1
    assert "no incident so far" in capsys.readouterr().err
    collected = Collected(run="x", incident=3, journal=str(tmp_path / "journal.db"))
    with pytest.raises(ReportError, match="no incident 3"):
        build(collected, None)


def test_the_oldest_folders_go_first_and_the_newest_stays(tmp_path: Path) -> None:
    for number in range(1, 13):
        folder = folder_of(tmp_path, number)
        folder.mkdir(parents=True)
        (folder / "report.md").write_bytes(b"x" * 1000)
    (tmp_path / "incidents" / "notes").mkdir()
    assert keep_few(tmp_path, keep=10, bytes_max=1 << 20) == [1, 2]
    assert keep_few(tmp_path, keep=10, bytes_max=3500) == list(range(3, 10))
    assert keep_few(tmp_path, keep=10, bytes_max=1) == [10, 11]
    assert kept(tmp_path) == [12]
    assert (tmp_path / "incidents" / "notes").is_dir()


def test_a_log_that_was_turned_over_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "s.log"
    (tmp_path / "s.log.1").write_text("old line\n")
    path.write_text("new line\n")
    found = cut_out("s", LogSpan(path=str(path), opened_at=90), bytes_max=1000)
    assert not isinstance(found, str)
    assert found.lines[-1] == "new line"
    missing = cut_out("s", LogSpan(path=str(tmp_path / "none"), opened_at=0), bytes_max=1000)
    assert isinstance(missing, str)
    assert "cannot be read" in missing


def test_of_a_long_log_the_beginning_and_the_end_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "s.log"
    path.write_text("".join(f"line {number}\n" for number in range(20_000)))
    found = cut_out("s", LogSpan(path=str(path), opened_at=0), bytes_max=4000)
    assert not isinstance(found, str)
    assert found.lines[0] == "line 0"
    assert found.lines[-1] == "line 19999"
    assert any("left out" in line for line in found.lines)
    assert sum(map(len, found.lines)) < 5000


def test_metrics_that_moved_are_summed_over_their_labels() -> None:
    before = 'sglang:a{x="1"} 1\nsglang:a{x="2"} 2\nsglang:b_bucket{le="1"} 9\nbroken line\n'
    figures = metric_figures("s", before, "sglang:a 7\nsglang:c 1\n")
    assert [(one.name, one.before, one.after) for one in figures] == [
        ("sglang:a", 3.0, 7.0),
        ("sglang:c", None, 1.0),
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--api-key abc --port 5", "--api-key <secret> --port 5"),
        ("api_key='s', max_total_tokens=3, token usage: 0.4", None),
        ("WANDB_API_KEY=deadbeef", "WANDB_API_KEY=<secret>"),
        ("https://user:pw@host/x", "https://<secret>@host/x"),
        ("https://hooks.slack.com/services/T/B/x", "https://hooks.slack.com/<secret>"),
        ("token hf_abcdefghijklmnopqrst", "token <secret>"),
        ("#new-token: 5, num_tokens=7", "#new-token: 5, num_tokens=7"),
    ],
)
def test_secrets_are_taken_out_and_counts_of_tokens_are_not(text: str, shown: str | None) -> None:
    if shown is None:
        assert redacted(text) == "api_key=<secret>, max_total_tokens=3, token usage: 0.4"
    else:
        assert redacted(text) == shown


def test_a_command_is_shown_without_its_secrets() -> None:
    command = ["python", "--api-key", "abc", "--max-new-tokens", "5", "--hf-token=x"]
    assert redacted_command(command) == [
        "python", "--api-key", "<secret>", "--max-new-tokens", "5", "--hf-token=<secret>",
    ]  # fmt: skip


def test_an_open_incident_says_that_it_is_held(tmp_path: Path) -> None:
    world = Recording()
    world.steps(8)
    world.kill()
    written(tmp_path / "journal.db", world.rows)
    collected = Collected(run="x", incident=1, journal=str(tmp_path / "journal.db"))
    report = build(collected, None)
    assert report.stage == "held"
    assert "The trainer is still held." in report.summary
    assert any(what == "let it go on" for what, _ in report.commands)


def test_in_mode_hold_the_first_thing_to_do_is_the_first_command(tmp_path: Path) -> None:
    world = Recording(mode="hold")
    world.steps(8)
    world.kill()
    written(tmp_path / "journal.db", world.rows)
    report = build(Collected(run="x", incident=1, journal=str(tmp_path / "journal.db")), None)
    assert report.steps[0].startswith("Restart s by the command below")
    assert report.commands[1] == ("restart the server", "stepguard restart-server s")


def test_a_lockout_says_that_a_person_has_to_decide(tmp_path: Path) -> None:
    world = Recording(settings=Settings(restart_budget=0))
    world.steps(8)
    world.kill()
    world.run(2)
    written(tmp_path / "journal.db", world.rows)
    collected = Collected(run="x", incident=1, journal=str(tmp_path / "journal.db"))
    report = build(collected, None)
    assert report.stage == "locked out"
    assert report.steps[0].startswith("Decide now")
    assert {what for what, _ in report.commands} >= {"let it go on", "restart the server"}


@pytest.mark.parametrize(("pid", "is_ours"), [("2161", True), ("99", False)])
def test_a_kill_of_a_stranger_is_no_evidence(report: Report, pid: str, is_ours: bool) -> None:
    """The kernel tells of every kill on the machine."""
    ours = {str(known.pid) for *_, after in report.passage.walk() for s in after.servers for known in s.procs}
    victim = min(ours) if is_ours else pid
    lines = (
        "[     0.900000] python: invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0",
        f"[     1.000000] Out of memory: Killed process {victim} (python) total-vm:9kB",
        "[     1.100000] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.",
    )
    signs = ((1, "host_oom_kill", None), (2, "xid", None))
    log = LogSlice(name="kernel", path="/dev/kmsg", lines=lines, before=2, signs=signs)
    found = without_strangers(log, report.passage)
    assert found.lines == (lines if is_ours else lines[2:])
    assert found.before == (2 if is_ours else 0)
    assert found.signs == (signs if is_ours else ((0, "xid", None),))


def test_a_writer_waits_for_the_row_that_ends_the_incident(state_dir: Path) -> None:
    journal = state_dir / "journal.db"
    assert has_notice(journal, 1, "resolved")
    assert not has_notice(journal, 1, "locked_out")
    assert not has_notice(journal, 2, "resolved")


def test_the_kernels_kill_in_the_run_is_evidence_and_a_strangers_is_none(tmp_path: Path) -> None:
    world = Recording()
    world.steps(12)
    for role in (Role.UNKNOWN, Role.OTHER):
        world.feed(OomSeen(kind=OomKind.KERNEL_CGROUP, role=role, name="a-stranger", cgroup="/theirs"))
    world.feed(OomSeen(kind=OomKind.CGROUP_COUNTER, role=Role.TRAINER, cgroup="/ours"))
    world.kill()
    world.run(30)
    world.steps(6)
    written(tmp_path / "journal.db", world.rows)
    collected = Collected(
        run="math", incident=1, journal=str(tmp_path / "journal.db"), run_dir="/run/stepguard/math"
    )
    write_collected(folder_of(tmp_path, 1), collected)
    report = write_report(collected, folder_of(tmp_path, 1))
    (found,) = [one for one in report.hypotheses if one.cause is Cause.HOST_OOM]
    told = [line for line in found.supporting if "the kernel killed for memory" in line]
    assert len(told) == 1
    assert "in cgroup /ours, where the trainer runs" in told[0]


def test_a_timeline_is_told_in_sentences(tmp_path: Path) -> None:
    """No event by its name, no reason by its code; what is told again and again is told once."""
    world = Recording()
    world.steps(12)
    world.kill()
    for count in (8, 16, 32, 0):
        world.feed(RequestsFailed(attempt=0, in_a_row=count, error="ConnectionRefusedError api_key=abc"))
    world.feed(SchedulerAsked(server="s", info=Answer.TIMEOUT, waited_s=5.0))
    world.feed(GenerationAsked(server="s", answer=Answer.TIMEOUT, waited_s=10.0))
    for _ in range(3):
        world.feed(LogSeen(sign=Sign.NCCL_ERROR, server="s", line="NCCL WARN Call to ibv failed"))
    world.feed(LogSeen(sign=Sign.READY, server="s", line="The server is fired up and ready to roll!"))
    world.feed(MemoryPressed(short=True, some_10s=40.0, full_10s=10.0))
    world.feed(MemoryPressed(short=False, some_10s=0.0, full_10s=0.0))
    world.feed(GpuTroubled(trouble=GpuTrouble.XID, gpu=3, number=79, text="GPU 3 reported Xid 79"))
    world.feed(CallsHung(attempt=0, what="grade", failed=40, calls=64))
    world.feed(OomSeen(kind=OomKind.KERNEL_CGROUP, role=Role.OTHER, name="a-stranger", cgroup="/theirs"))
    world.run(30)
    world.steps(6)
    written(tmp_path / "journal.db", world.rows)
    report = build(Collected(run="math", incident=1, journal=str(tmp_path / "journal.db")), None)
    told = [moment.text for moment in report.moments]
    names = [kind.__name__ for kind in get_args(Event)]
    codes = [code.value for code in Reason if "_" in code]
    assert [text for text in told if any(word in text for word in (*names, *codes))] == []
    assert [text for text in told if "a-stranger" in text] == []
    for sentence in (
        "32 requests in a row of the trainer failed: ConnectionRefusedError api_key=<secret>",
        "the trainer's requests are answered again",
        "the scheduler of s gave no answer for 5.0 s (timeout)",
        "s gave no token for 10.0 s (timeout)",
        "nobody waits for memory any more",
        "GPU 3 reported Xid 79",
        "40 of 64 calls hung at once: grade",
        "s is being restarted (server died)",
    ):
        assert told.count(sentence) == 1, (sentence, told)
    assert [text for text in told if "NCCL" in text] == [
        "log: NCCL WARN Call to ibv failed (and 2 more like it)"
    ]
    assert not any("fired up" in text for text in told)


def test_a_traceback_is_told_by_its_end() -> None:
    log = LogSlice(
        name="trainer",
        path="/t.log",
        lines=(
            "2026-11-26 02:52:38 ERROR it failed",
            "Traceback (most recent call last):",
            *(
                line
                for n in range(5)
                for line in (f'  File "a.py", line {n}, in f{n}', f"    f{n + 1}()", "    ^^")
            ),
            "ValueError: no",
            "it goes on",
        ),
        before=0,
    )
    _, shown, _, hidden = shown_lines(log)
    assert shown == [
        "2026-11-26 02:52:38 ERROR it failed",
        "Traceback (most recent call last):",
        "  … 4 frames",
        '  File "a.py", line 4, in f4',
        "    f5()",
        "    ^^",
        "ValueError: no",
        "it goes on",
    ]
    assert hidden == 0


def test_what_no_log_explains_is_said_to_come_from_outside(report: Report) -> None:
    assert any("the log of s says it" in step for step in report.steps)


def test_steps_that_a_relaunch_takes_again_are_part_of_the_cost(tmp_path: Path) -> None:
    """The reference run was at step 36 and goes on from 20: sixteen steps are taken a second time."""
    world = Recording()
    world.steps(36)
    world.kill()
    world.run(30)
    world.attempt = 1
    for step in range(21, 25):
        world.feed(StepCommitted(attempt=1, step=step, reward=0.5))
    written(tmp_path / "journal.db", world.rows)
    cost = build(Collected(run="math", incident=1, journal=str(tmp_path / "journal.db")), None).cost
    assert cost.steps_again == 16


def test_a_report_of_mode_shadow_says_what_was_not_done_and_costs_nothing(tmp_path: Path) -> None:
    """Nothing was held, so nobody reads that the trainer is held, for how long, or how to let it go."""
    world = Recording(mode="shadow")
    world.steps(12)
    world.kill()
    world.run(30)
    written(tmp_path / "journal.db", world.rows)
    run_dir = "/run/stepguard/math"
    collected = Collected(run="math", incident=1, journal=str(tmp_path / "journal.db"), run_dir=run_dir)
    report = build(collected, None)
    assert (report.stage, report.cost.held_s) == ("watched", 0.0)
    assert set(report.would) == {"would hold the trainer in mode hold", "would restart s in mode act"}
    page, text = as_page(report), as_markdown(report)
    for line in (*report.would, "Nothing: it only looked on."):
        assert line in text
        assert line in page
    assert "still held" not in text
    assert "stepguard resume" not in text
