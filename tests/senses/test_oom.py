"""Out of memory: the parsers on the kernel's own words, and a real kernel kill seen from both sides."""

import itertools
import json
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from requirements import require
from senses.memory_cgroups import limited_memory_cgroup
from stepguard.cgroups import MemoryCgroup, find_memory_cgroup, kill_count, memory_cgroup, parse_kills
from stepguardd.core.events import OomKind, Role
from stepguardd.sources import kmsg
from stepguardd.sources.cgroups import (
    KillAlarm,
    KillCounter,
    memory_pressure,
    parse_pressure,
    pressure_warning,
)
from stepguardd.sources.kmsg import (
    Journal,
    KernelLogError,
    KernelMessage,
    Kmsg,
    open_kernel_log,
    parse_record,
)
from stepguardd.sources.logs import LogFollower
from stepguardd.sources.oom import KernelKills, OomSense, oom_in_log, size_bytes

ANNOUNCED = (
    b"6,423,4132400076,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,"
    b"oom_memcg=/job/a,task_memcg=/job/a/b,task=python3,pid=5361,uid=1000\n SUBSYSTEM=x\n"
)
KILLED = (
    b"3,424,4132400095,-;Memory cgroup out of memory: Killed process 5361 (python3) total-vm:78260kB, "
    b"anon-rss:67712kB, file-rss:6620kB, shmem-rss:4kB, UID:1000 pgtables:196kB oom_score_adj:-17\n"
)
HOST = (
    b"6,9,1000,-;oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0-1,global_oom,"
    b"task_memcg=/user.slice,task=sglang::schedul,pid=77,uid=0\n",
    b"3,10,2000,-;Out of memory: Killed process 77 (sglang::schedul) total-vm:9000kB, anon-rss:5000kB, "
    b"file-rss:0kB, shmem-rss:0kB, UID:0 pgtables:20kB oom_score_adj:0\n",
)
OLD = b"3,11,3000,-;Killed process 78 (a (b) c) total-vm:9000kB, anon-rss:5000kB, file-rss:1kB\n"


def servers(pid: int | None, name: str | None) -> Role:
    return Role.SERVER if pid in {77, 5361} else Role.UNKNOWN


def message(record: bytes) -> KernelMessage:
    parsed = parse_record(record)
    assert parsed is not None
    return parsed


def test_a_kill_in_a_cgroup_with_every_field():
    kills = KernelKills(servers)
    assert kills.take(message(ANNOUNCED)) is None
    kill = kills.take(message(KILLED))
    assert kill is not None
    assert (kill.kind, kill.role, kill.pid, kill.name) == (
        OomKind.KERNEL_CGROUP,
        Role.SERVER,
        5361,
        "python3",
    )
    assert kill.used_bytes == 1024 * (67712 + 6620 + 4)
    assert kill.cgroup == "/job/a"
    assert kill.time_s == 4132.400095
    assert kill.crashed
    assert kill.facts == {
        "constraint": "CONSTRAINT_MEMCG",
        "oom_memcg": "/job/a",
        "task_memcg": "/job/a/b",
        "task": "python3",
        "pid": "5361",
        "uid": "1000",
        "scope": "Memory cgroup out of memory",
        "name": "python3",
        "total_vm": "78260",
        "anon_rss": "67712",
        "file_rss": "6620",
        "shmem_rss": "4",
        "pgtables": "196",
        "oom_score_adj": "-17",
    }


def test_a_kill_of_the_whole_machine_and_an_old_kernels_words():
    kills = KernelKills(servers)
    kills.take(message(HOST[0]))
    kill = kills.take(message(HOST[1]))
    assert kill is not None
    assert (kill.kind, kill.name, kill.cgroup) == (OomKind.KERNEL_HOST, "sglang::schedul", "/user.slice")
    assert kill.facts["host"] == "global_oom"
    old = kills.take(message(OLD))
    assert old is not None
    assert (old.kind, old.name, old.used_bytes, old.cgroup) == (
        OomKind.KERNEL_HOST,
        "a (b) c",
        5001 * 1024,
        None,
    )


def test_what_was_announced_in_a_cgroup_is_one_there_whatever_the_later_words():
    kills = KernelKills(servers)
    kills.take(message(ANNOUNCED.replace(b"pid=5361", b"pid=78")))
    kill = kills.take(message(OLD))
    assert kill is not None
    assert (kill.kind, kill.cgroup) == (OomKind.KERNEL_CGROUP, "/job/a")


def test_a_process_cannot_feign_the_kernel():
    """A record that a process wrote into the log has another facility than the kernel's."""
    assert parse_record(KILLED.replace(b"3,424", b"11,424")) is None
    assert parse_record(b"no record") is None
    assert message(rb"6,1,5,-;two\x0alines \x41").text == "two\nlines A"


def test_counters_of_both_versions(tmp_path):
    """Fixture files, for the version that a machine has not: only new kills count, and unknown is not 0."""
    for version, name, text in [
        (1, "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"),
        (2, "memory.events", "low 0\nhigh 7\nmax 9\noom 3\noom_kill {}\noom_group_kill 0\n"),
    ]:
        folder = tmp_path / str(version)
        folder.mkdir()
        cgroup = MemoryCgroup(name="/job", folder=folder, version=version)
        assert kill_count(cgroup) is None
        (folder / name).write_text(text.format(2))
        counter = KillCounter(cgroup)
        assert counter.new_kills() == 0
        (folder / name).write_text(text.format(5))
        assert [counter.new_kills(), counter.new_kills()] == [3, 0]
        (folder / name).unlink()
        assert counter.new_kills() == 0
        (folder / name).write_text(text.format(6))
        [seen] = OomSense(role_of=servers, counters=[(counter, Role.TRAINER)]).poll()
        assert (seen.kind, seen.role, seen.count, seen.cgroup) == (
            OomKind.CGROUP_COUNTER,
            Role.TRAINER,
            1,
            "/job",
        )


MOUNTS = r"""
25 1 8:1 / / rw - ext4 /dev/sda rw
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""
CONTAINER = r"40 30 0:29 /docker/abc /sys/fs/cgr\040oup rw - cgroup2 cgroup rw,nsdelegate"


def test_the_cgroup_of_a_process_is_found_in_hybrid_and_in_containers():
    hybrid = find_memory_cgroup("4:memory:/job/a\n0::/system.slice\n", MOUNTS)
    assert hybrid == MemoryCgroup(name="/job/a", folder=Path("/sys/fs/cgroup/memory/job/a"), version=1)
    unified = find_memory_cgroup("0::/docker/abc/sub\n", CONTAINER)
    assert unified == MemoryCgroup(name="/docker/abc/sub", folder=Path("/sys/fs/cgr oup/sub"), version=2)
    assert find_memory_cgroup("0::/elsewhere\n", CONTAINER) is None
    assert find_memory_cgroup("0::/docker/abc/../../x\n", CONTAINER) is None
    assert find_memory_cgroup("", MOUNTS) is None


def test_pressure_is_read_and_becomes_a_warning_only_when_it_is_high():
    text = "some avg10=31.50 avg60=4.00 avg300=1.00 total=9\nfull avg10=0.25 avg60=0.10 avg300=0.00 total=3\n"
    pressure = parse_pressure(text)
    assert pressure is not None
    assert (pressure.some_10s, pressure.some_60s, pressure.full_10s, pressure.full_60s) == (
        31.5,
        4.0,
        0.25,
        0.1,
    )
    assert "32 %" in (pressure_warning(pressure) or "")
    assert pressure_warning(pressure, some_10s_max=40) is None
    assert pressure_warning(None) is None
    assert parse_pressure("some avg10=1.0") is None
    assert parse_pressure(text.replace("31.50", "3.1.5")) is None
    here = memory_pressure()
    assert here is None or 0 <= here.some_10s <= 100


def test_the_journal_is_read_as_the_kernels_log(tmp_path):
    """A stand-in for journalctl prints entries as it does, one of them in its form for odd bytes."""
    lines = [
        json.dumps(
            {"MESSAGE": KILLED.split(b";", 1)[1].decode().strip(), "_SOURCE_MONOTONIC_TIMESTAMP": "5000000"}
        ),
        json.dumps({"MESSAGE": list(b"odd \xff")}),
        "no json",
    ]
    program = tmp_path / "journalctl"
    quoted = "\n".join(lines)
    program.write_text(
        f"#!/bin/sh\ntest \"$1\" = --dmesg || exit 9\ncat <<'EOF'\n{quoted}\nEOF\nexec sleep 60\n"
    )
    program.chmod(0o755)
    log = Journal(str(program))
    try:
        seen = []
        for _ in range(200):
            select.select([log.fileno()], [], [], 0.1)
            seen += log.poll()
            if len(seen) == 2 and log.lost:
                break
        assert [entry.time_s for entry in seen] == [5.0, None]
        assert seen[1].text == "odd �"
        assert log.lost == 1
        assert KernelKills(servers).take(seen[0]) is not None
    finally:
        log.close()


def test_where_neither_can_be_read_both_reasons_are_said(tmp_path):
    with pytest.raises(KernelLogError, match=r"nowhere: No such file.*CAP_SYSLOG.*no-journal: No such file"):
        open_kernel_log(tmp_path / "nowhere", str(tmp_path / "no-journal"), tmp_path)
    ended = tmp_path / "journalctl"
    ended.write_text("#!/bin/sh\nexit 3\n")
    ended.chmod(0o755)
    with pytest.raises(KernelLogError, match="no journald runs here"):
        open_kernel_log(tmp_path / "nowhere", str(ended), tmp_path / "no-socket")
    log = open_kernel_log(tmp_path / "nowhere", str(ended), tmp_path)
    select.select([log.fileno()], [], [], 10)
    with pytest.raises(KernelLogError, match="has ended"):
        log.poll()
    log.close()


def test_logs_tell_of_cuda_ray_and_the_pool(tmp_path):
    log = tmp_path / "server.log"
    oom = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has a total capacity of 79.10 GiB"
    log.write_text(
        "\n".join(
            [
                oom,
                "server_args=ServerArgs(x)",
                oom,
                "Not enough memory. Please try to increase --mem-fraction-static.",
                "The server is fired up and ready to roll!",
                oom,
                "KV cache pool is full. Retract requests. #retracted_reqs: 3",
                "Killed due to the node running low on memory. The task (pid=123, memory used=21.50GB)",
                "SIGQUIT received.",
            ]
        )
        + "\n"
    )
    seen = [oom_in_log(match, Role.SERVER) for match in LogFollower(log).poll()]
    known = [event for event in seen if event is not None]
    assert [event.kind for event in known] == [
        OomKind.CUDA_UNKNOWN,
        OomKind.CUDA_START,
        OomKind.POOL_TOO_SMALL,
        OomKind.CUDA_RUN,
        OomKind.KV_FULL,
        OomKind.RAY_MONITOR,
    ]
    assert (known[0].gpu, known[0].used_bytes, known[0].role) == (3, 2 << 30, Role.SERVER)
    assert [event.crashed for event in known] == [True, True, True, True, False, True]
    assert (known[5].pid, known[5].used_bytes) == (123, int(21.5 * 2**30))


@pytest.mark.parametrize(
    ("text", "size"),
    [("2.00 GiB", 2 << 30), ("512 MiB", 512 << 20), ("21.50GB", int(21.5 * 2**30)), ("7B", 7)],
)
def test_sizes(text, size):
    assert size_bytes(text) == size


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=300), data=st.data())
def test_no_bytes_are_trouble(raw, data):
    """Random bytes, and the kernel's own lines with some of theirs exchanged."""
    text = raw.decode("latin-1")
    parse_kills(text)
    parse_pressure(text)
    find_memory_cgroup(text, MOUNTS)
    find_memory_cgroup("4:memory:/x\n", text)
    size_bytes(text)
    kmsg.parse_journal_line(raw)
    parse_record(raw)
    kills = KernelKills(servers)
    for record in [ANNOUNCED, KILLED, *HOST, OLD]:
        line = bytearray(record)
        for _ in range(data.draw(st.integers(0, 4))):
            at = data.draw(st.integers(0, len(line)))
            line[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=5))
        parsed = parse_record(bytes(line))
        if parsed is not None:
            kills.take(parsed)


@settings(max_examples=100, deadline=None)
@given(
    fields=st.dictionaries(
        st.sampled_from(["MESSAGE", "_SOURCE_MONOTONIC_TIMESTAMP"]),
        st.none() | st.text() | st.lists(st.integers()),
    )
)
def test_no_journal_entry_is_trouble(fields):
    kmsg.parse_journal_line(json.dumps(fields).encode())


# --- the real thing ---


@pytest.fixture
def limited_cgroup() -> Iterator[MemoryCgroup]:
    with limited_memory_cgroup(64 << 20) as cgroup:
        yield cgroup


EATER = """
import sys
sys.stdin.read(1)
eaten = []
while True:
    eaten.append(bytearray(1 << 20))
"""


@pytest.mark.e2e
def test_a_real_kernel_kill_is_seen_from_the_cgroup_and_from_the_log(limited_cgroup: MemoryCgroup):
    """A process eats more than its cgroup has: the counter, the alarm and the log tell of it."""
    try:
        log = Kmsg()
    except KernelLogError as closed:
        require("oom", str(closed))
    alarm = KillAlarm(limited_cgroup)
    counter = KillCounter(limited_cgroup)
    with subprocess.Popen([sys.executable, "-c", EATER], stdin=subprocess.PIPE) as eater:
        (limited_cgroup.folder / "cgroup.procs").write_text(str(eater.pid))
        assert memory_cgroup(eater.pid) == limited_cgroup
        sense = OomSense(
            role_of=lambda pid, name: Role.SERVER if pid == eater.pid else Role.OTHER,
            kernel_log=log,
            counters=[(counter, Role.SERVER)],
        )
        assert sense.poll() == ()
        assert eater.stdin is not None
        eater.stdin.write(b"x")
        eater.stdin.close()
        assert eater.wait(timeout=30) == -9
        seen = []
        for _ in itertools.repeat(None, 100):
            seen += sense.poll()
            if {event.kind for event in seen} >= {OomKind.CGROUP_COUNTER, OomKind.KERNEL_CGROUP}:
                break
            select.select([log.fileno(), alarm.fileno()], [], [], 0.05)
    rung, _, _ = select.select([alarm.fileno()], [], [], 1.0)
    assert rung, "the alarm must ring"
    alarm.clear()
    assert select.select([alarm.fileno()], [], [], 0)[0] == []
    alarm.close()
    log.close()
    [by_counter] = [event for event in seen if event.kind is OomKind.CGROUP_COUNTER]
    [by_log] = [event for event in seen if event.kind is OomKind.KERNEL_CGROUP]
    assert (by_counter.count, by_counter.cgroup, by_counter.role) == (1, limited_cgroup.name, Role.SERVER)
    assert (by_log.pid, by_log.cgroup, by_log.role) == (eater.pid, limited_cgroup.name, Role.SERVER)
    assert by_log.name is not None
    assert by_log.name.startswith("python")
    assert by_log.used_bytes is not None
    assert 32 << 20 < by_log.used_bytes < 200 << 20


@pytest.mark.e2e
def test_the_real_kernel_log_is_read_from_its_end():
    try:
        log = Kmsg()
    except KernelLogError as closed:
        require("oom", str(closed))
    try:
        assert log.poll() == ()
        Path("/dev/kmsg").write_text("<12>stepguard: a test writes into the log\n")
        assert all("a test writes" not in entry.text for entry in log.poll()), (
            "no process can feign the kernel"
        )
        assert log.lost == 0
    finally:
        log.close()
