"""Who lives, who ended, who is stopped: on real processes, by the kernel's own word."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon_parts.conftest import Start, until
from requirements import require
from stepguardd import proc
from stepguardd.core.events import Event, Proc, ProcessExited, TreeSampled, TreeSeen
from stepguardd.effects.processes import end, gone, send
from stepguardd.sources.process import ExitWatch, ServerProcesses

FAMILY = "sleep 1000 & sleep 1000 & wait"
ORPHANS = "sleep 1000 & sleep 1000 & exit 0"
NAMED = "(exec -a sglang::scheduler_TP0 sleep 1000) & (exec -a sglang::detokenizer sleep 1000) & wait"


def family(start: Start, script: str = FAMILY, members: int = 3) -> tuple[Proc, ...]:
    """A tree, as soon as it is complete."""
    child = start(script)
    until(lambda: len(proc.tree(child.pid)) == members, "the whole tree")
    return proc.tree(child.pid)


def of(pid: int) -> Proc:
    found = proc.stat(pid)
    assert found is not None
    return Proc(pid=pid, start_ticks=found.start_ticks, role="server")


def dead(pid: int) -> bool:
    found = proc.stat(pid)
    return found is None or found.dead


# ---- /proc -----------------------------------------------------------------------------------------


def test_a_tree_is_the_root_first_and_all_that_it_started(start: Start) -> None:
    tree = family(start)
    assert [known.role for known in tree] == ["server", "child", "child"]
    assert all(proc.alive(known) for known in tree)


def test_processes_are_told_by_their_titles(start: Start) -> None:
    until_titles = {"server", "scheduler", "detokenizer"}
    child = start(NAMED)
    until(lambda: {known.role for known in proc.tree(child.pid)} >= until_titles, "the titles")


def test_orphans_are_found_by_their_session_after_their_parent_died(start: Start) -> None:
    child = start(ORPHANS)
    child.wait(timeout=10)
    tree = proc.tree(child.pid)
    assert len(tree) == 2
    assert child.pid not in {known.pid for known in tree}


def test_a_known_tree_is_looked_at_again_with_its_new_children_and_its_orphans(start: Start) -> None:
    """Without a look at the whole machine; only a dead root asks for one."""
    child = start("(sleep 1000 & sleep 1000) & wait; while :; do read -t 1 -n 1; sleep 1000; done")
    until(lambda: len(proc.tree(child.pid)) >= 3, "the tree")
    known = proc.tree(child.pid)
    middle = next(one for one in known[1:] if any(proc.stat(o.pid).ppid == one.pid for o in known))  # type: ignore[union-attr]
    os.kill(middle.pid, signal.SIGKILL)
    until(lambda: not proc.alive(middle), "the one in the middle is dead")
    until(lambda: len(proc.family(known) or ()) >= 3, "the orphan and a new child")
    found = proc.family(known)
    assert found is not None
    assert found[0] == known[0]
    assert set(known) - {middle} <= set(found)
    assert set(found) == set(proc.tree(child.pid))
    os.kill(child.pid, signal.SIGKILL)
    until(lambda: not proc.alive(known[0]), "the root is dead")
    assert proc.family(known) is None
    assert proc.family(()) is None


def test_a_process_that_nobody_reaped_is_dead() -> None:
    child = subprocess.Popen(["sleep", "1000"])
    known = of(child.pid)
    assert proc.alive(known)
    child.kill()
    until(lambda: (found := proc.stat(child.pid)) is not None and found.state == "Z", "a zombie")
    assert not proc.alive(known)
    assert proc.unmistaken(known)
    assert proc.tree(child.pid) == ()
    child.wait()
    assert not proc.alive(known)


def test_a_pid_used_again_is_another_process(start: Start) -> None:
    living = family(start)[0]
    older = Proc(pid=living.pid, start_ticks=living.start_ticks - 1, role="server")
    assert not proc.alive(older)
    assert not proc.unmistaken(older)
    assert send([older], signal.SIGKILL) == 0
    assert proc.alive(living)


def test_a_stopped_process_is_seen_and_is_not_dead(start: Start) -> None:
    root = family(start)[0]
    os.kill(root.pid, signal.SIGSTOP)
    until(lambda: (found := proc.stat(root.pid)) is not None and found.stopped, "stopped")
    assert proc.alive(root)


def test_a_mark_in_the_environment_finds_the_root_and_its_family(start: Start) -> None:
    child = start(FAMILY, STEPGUARD_TEST_MARK="x/1")
    until(lambda: len(proc.marked("STEPGUARD_TEST_MARK", "x/1")) == 3, "marked")
    assert proc.marked("STEPGUARD_TEST_MARK", "x/1")[0].pid == child.pid
    assert proc.marked("STEPGUARD_TEST_MARK", "x/") == ()


def test_a_port_is_told_with_the_process_that_listens_on_it() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert not proc.port_taken(port)
        listener.listen()
        assert proc.port_taken(port)
        assert proc.port_owner(port) == os.getpid()
        assert proc.listening(port, [1]) is None
    assert not proc.port_taken(port)


STAT = b"7 (%s) S 1 7 7 0 -1 4194560 1 0 0 0 250 50 0 0 20 0 1 0 4711 8192 1 184467 1 1 0"


@pytest.mark.parametrize("name", [b"a", b"a b", b"a) S 99 (b", b")))", b"((", b"", b"\xff\xfe", b"x" * 15])
def test_a_name_of_any_characters_does_not_shift_the_fields(name: bytes) -> None:
    found = proc.parse_stat(STAT % name)
    assert found is not None
    assert (found.pid, found.ppid, found.session, found.start_ticks, found.state) == (7, 1, 7, 4711, "S")
    assert found.cpu_s == pytest.approx(3.0)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_process_or_none(text: bytes) -> None:
    proc.parse_stat(text)


def test_this_machines_processes_can_all_be_read() -> None:
    assert os.getpid() in {found.pid for found in proc.every()}


# ---- exits -----------------------------------------------------------------------------------------


def watched(act: Callable[[ExitWatch], None], count: int) -> list[tuple[Proc, int | None]]:
    """What a watch tells, up to so many exits."""

    async def watch() -> list[tuple[Proc, int | None]]:
        told: list[tuple[Proc, int | None]] = []
        enough = asyncio.Event()

        def on_exit(ended: Proc, code: int | None) -> None:
            told.append((ended, code))
            if len(told) >= count:
                enough.set()

        watch = ExitWatch(on_exit)
        try:
            act(watch)
            async with asyncio.timeout(10):
                await enough.wait()
        finally:
            watch.close()
        return told

    return asyncio.run(watch())


@pytest.mark.parametrize(("what", "code"), [("exit 3", 3), ("kill -9 $$", -9), ("kill -15 $$", -15)])
def test_the_end_of_a_child_is_told_with_its_code(what: str, code: int) -> None:
    child = subprocess.Popen(["bash", "-c", f"read; {what}"], stdin=subprocess.PIPE)
    known = of(child.pid)
    assert child.stdin is not None

    def act(watch: ExitWatch) -> None:
        watch.watch(frozenset({known}))
        assert child.stdin is not None
        child.stdin.close()

    assert watched(act, 1) == [(known, code)]
    child.wait()


def test_the_end_of_a_grandchild_is_told_without_a_code(start: Start) -> None:
    tree = family(start)

    def act(watch: ExitWatch) -> None:
        watch.watch(frozenset(tree))
        os.kill(tree[1].pid, signal.SIGKILL)

    assert watched(act, 1) == [(tree[1], None)]


def test_one_that_is_dead_already_is_told_before_the_call_returns(start: Start) -> None:
    tree = family(start)
    os.kill(tree[2].pid, signal.SIGKILL)
    until(lambda: dead(tree[2].pid), "dead")
    told: list[Proc] = []

    async def watch() -> frozenset[Proc]:
        watch = ExitWatch(lambda ended, code: told.append(ended))
        watch.watch(frozenset(tree))
        assert told == [tree[2]]
        kept = watch.watched
        watch.close()
        return kept

    assert asyncio.run(watch()) == frozenset(tree[:2])


def test_a_pid_used_again_is_told_as_ended_and_its_new_owner_left_alone(start: Start) -> None:
    living = family(start)[0]
    older = Proc(pid=living.pid, start_ticks=living.start_ticks - 1, role="server")
    assert watched(lambda watch: watch.watch(frozenset({older})), 1) == [(older, None)]
    assert proc.alive(living)


def test_watching_leaves_no_descriptor_behind(start: Start) -> None:
    tree = family(start)
    before = len(list(Path("/proc/self/fd").iterdir()))

    async def watch() -> None:
        watch = ExitWatch(lambda ended, code: None)
        for _ in range(50):
            watch.watch(frozenset(tree))
            watch.watch(frozenset(tree[:1]))
        watch.close()

    asyncio.run(watch())
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# ---- a server's processes as events ----------------------------------------------------------------


def test_a_servers_tree_is_told_watched_and_sampled(start: Start) -> None:
    tree = family(start)
    events: list[Event] = []

    async def live() -> None:
        told = asyncio.Event()

        def emit(event: Event) -> None:
            events.append(event)
            if isinstance(event, ProcessExited):
                told.set()

        processes = ServerProcesses("s", lambda: proc.tree(tree[0].pid), emit)
        processes.look()
        processes.look()
        assert events == [TreeSeen(server="s", procs=tree)]  # told once while nothing changes
        os.kill(tree[1].pid, signal.SIGSTOP)
        await asyncio.to_thread(until, lambda: proc.stat(tree[1].pid).stopped, "stopped")  # type: ignore[union-attr]
        processes.sample()
        assert isinstance(events[-1], TreeSampled)
        assert events[-1].stopped == (tree[1].pid,)
        os.kill(tree[2].pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            await told.wait()
        assert events[-1] == ProcessExited(server="s", proc=tree[2])
        processes.look()
        assert events[-1] == TreeSeen(server="s", procs=tree[:2])
        processes.close()

    asyncio.run(live())


def test_a_process_that_waits_in_the_kernel_is_told_as_such(tmp_path: Path) -> None:
    """State D for real: a parent waits there until the child of its vfork(2) has ended."""
    compiler = shutil.which("cc")
    if compiler is None:
        require("cc", "no C compiler to make a program that waits in the kernel")
    source, program = tmp_path / "waits.c", tmp_path / "waits"
    source.write_text(
        "#include <unistd.h>\nint main(void) { if (!vfork()) { sleep(60); _exit(0); } return 0; }\n"
    )
    subprocess.run([compiler, "-o", str(program), str(source)], check=True, timeout=60)
    events: list[Event] = []
    with subprocess.Popen([program]) as waiting:
        try:
            until(lambda: len(proc.tree(waiting.pid)) == 2, "it waits for its child")
            processes = ServerProcesses("s", lambda: proc.tree(waiting.pid), events.append)

            async def sampled() -> TreeSampled:
                processes.look()
                processes.sample()
                processes.close()
                assert isinstance(events[-1], TreeSampled)
                return events[-1]

            until(lambda: asyncio.run(sampled()).uninterruptible == (waiting.pid,), "it waits in the kernel")
            assert asyncio.run(sampled()).stopped == ()
        finally:
            for one in reversed(proc.tree(waiting.pid)):
                os.kill(one.pid, signal.SIGKILL)


def test_a_tree_that_is_gone_is_told_at_every_look(start: Start) -> None:
    events: list[Event] = []

    async def live() -> None:
        processes = ServerProcesses("s", tuple, events.append)
        processes.look()
        processes.look()
        processes.sample()

    asyncio.run(live())
    assert events == [TreeSeen(server="s", procs=())] * 2


# ---- signals ---------------------------------------------------------------------------------------


def test_a_healthy_tree_is_asked_first_and_may_end_by_itself(start: Start, tmp_path: Path) -> None:
    note = tmp_path / "asked"
    child = start(f"trap 'touch {note}; kill $(jobs -p); exit 0' TERM; sleep 1000 & wait")
    until(lambda: len(proc.tree(child.pid)) == 2, "the tree")
    tree = proc.tree(child.pid)
    assert asyncio.run(end(tree[:1], grace_s=10, timeout_s=10)) == ()
    assert note.exists()


def test_a_tree_that_does_not_listen_is_killed(start: Start) -> None:
    child = start("trap '' TERM; echo; sleep 1000 & wait; sleep 1000")
    until(lambda: len(proc.tree(child.pid)) >= 2, "the tree")
    tree = proc.tree(child.pid)
    assert asyncio.run(end(tree, grace_s=0.2, timeout_s=10)) == ()
    assert not any(proc.alive(known) for known in tree)


def test_a_tree_with_a_stopped_or_dead_member_is_not_waited_for(start: Start, tmp_path: Path) -> None:
    """It cannot drain: SGLang's parent would wait for a scheduler that never answers."""
    note = tmp_path / "asked"
    child = start(f"trap 'touch {note}' TERM; sleep 1000 & while :; do wait; done")
    until(lambda: len(proc.tree(child.pid)) == 2, "the tree")
    tree = proc.tree(child.pid)
    os.kill(tree[1].pid, signal.SIGSTOP)
    until(lambda: proc.stat(tree[1].pid).stopped, "stopped")  # type: ignore[union-attr]
    assert asyncio.run(end(tree, grace_s=1000, timeout_s=10)) == ()
    assert not note.exists()


def test_waiting_for_the_end_of_processes_ends_itself(start: Start) -> None:
    tree = family(start)
    assert asyncio.run(gone(tree, timeout_s=0.05)) == tree


def test_the_module_reads_no_other_clock_than_the_loops() -> None:
    assert "time" not in vars(sys.modules["stepguardd.effects.processes"])


def test_the_loop_is_urgent_where_that_is_allowed_and_what_it_starts_is_not() -> None:
    """In a process of its own; without the leave it stays ordinary, and says so."""
    code = (
        "import os, subprocess, threading; from stepguardd.urgency import urgent; allowed = urgent(); "
        "ours = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK; seen = []; "
        "thread = threading.Thread(target=lambda: seen.append(os.sched_getscheduler(0))); "
        "thread.start(); thread.join(); child = subprocess.Popen(['sleep', '1000']); "
        "seen.append(os.sched_getscheduler(child.pid)); child.kill(); child.wait(); "
        "print(allowed == (ours == os.SCHED_RR), seen == [os.SCHED_OTHER] * 2)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True, env=environment
    )
    assert done.stdout.split() == ["True", "True"]
