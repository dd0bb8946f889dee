"""The page: whole halves or nothing, whatever happens to the writer or the file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.virtual_daemon import BOOT
from stepguard import gate
from stepguard.gate import (
    PAGE_BYTES,
    PATH_BYTES_MAX,
    DaemonHalf,
    GateError,
    GatePage,
    NetworkFileSystem,
    NoPage,
    NotAPage,
    Order,
    PathTooLong,
    Phase,
    TrainerHalf,
    Unreachable,
    WrongBoot,
    WrongVersion,
)

GO = DaemonHalf(order=Order.GO, generation=1, lease_deadline_ns=5_000_000_000)
counts = st.integers(min_value=0, max_value=2**55 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)

daemon_halves = st.builds(
    DaemonHalf,
    order=st.sampled_from(Order),
    generation=counts,
    reason=texts,
    lease_deadline_ns=counts,
    target_step=st.none() | counts,
    target_path=st.none() | texts,
    judged_batch=counts,
    judged_step=st.none() | counts,
    judged_ok=st.booleans(),
)
trainer_halves = st.builds(
    TrainerHalf,
    pid=st.integers(1, 2**31),
    acked_generation=counts,
    attempt=st.integers(0, 2**31),
    step=st.none() | counts.map(lambda count: count - 1 if count else 0),
    phase=st.sampled_from(Phase),
    beats=counts,
    progress=counts,
    last_reward=st.none() | st.floats(allow_nan=False),
    rollouts_ok=counts,
    rollouts_failed=counts,
    weight_version=st.none() | texts,
    handles_resync=st.booleans(),
    handles_rollback=st.booleans(),
    handles_save=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(daemon=daemon_halves, trainer=trainer_halves)
def test_both_halves_come_back_as_written(daemon: DaemonHalf, trainer: TrainerHalf) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writer = GatePage.create(Path(folder) / "gate")
        reader = GatePage.open(Path(folder) / "gate", writable=False)
        writer.publish(daemon)
        writer.report(trainer)
        assert reader.daemon() == daemon
        assert reader.trainer() == trainer
        reader.close()
        writer.close()


def test_a_new_page_says_nothing_and_nothing_is_known(tmp_path: Path) -> None:
    page = GatePage.create(tmp_path / "gate")
    assert page.daemon() is None
    assert page.trainer() is None
    assert (tmp_path / "gate").stat().st_size == PAGE_BYTES
    assert [file.name for file in tmp_path.iterdir()] == ["gate"]


def test_a_restarted_daemon_adopts_the_page_without_disturbing_it(tmp_path: Path) -> None:
    first = GatePage.create(tmp_path / "gate")
    first.publish(GO)
    first.report(TrainerHalf(pid=7, step=188, phase=Phase.TRAIN))
    before = (tmp_path / "gate").read_bytes()
    second = GatePage.create(tmp_path / "gate")
    assert (tmp_path / "gate").read_bytes() == before
    second.renew_lease(9)
    assert first.daemon() == replace(GO, lease_deadline_ns=9)
    assert not first.replaced()


def test_a_page_from_another_boot_is_refused_by_name_and_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "gate"
    GatePage.create(path, boot_id=bytes(16)).publish(GO)
    with pytest.raises(WrongBoot, match=str(path)):
        GatePage.open(path, boot_id=BOOT)
    fresh = GatePage.create(path, boot_id=BOOT)
    assert fresh.daemon() is None


def test_a_page_of_another_version_is_refused_by_name_and_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "gate"
    old = GatePage.create(path)
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"\x63\0\0\0")
    with pytest.raises(WrongVersion, match="99") as refused:
        GatePage.open(path)
    assert str(path) in str(refused.value)
    GatePage.create(path).publish(GO)
    assert old.replaced()


def test_what_another_boot_wrote_into_a_mapped_page_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "gate"
    page = GatePage.create(path, boot_id=BOOT)
    page.publish(GO)
    with path.open("r+b") as file:
        file.seek(16)
        file.write(bytes(16))
    stranger = GatePage.open(path, boot_id=bytes(16))
    stranger.publish(replace(GO, generation=2))
    assert page.daemon() is None


@pytest.mark.parametrize("content", [b"", b"STEP", b"x" * PAGE_BYTES, b"\0" * PAGE_BYTES])
def test_what_is_no_page_is_refused_by_name_and_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "gate"
    path.write_bytes(content)
    with pytest.raises(NotAPage, match=str(path)):
        GatePage.open(path)
    assert GatePage.create(path).daemon() is None


def test_a_page_cut_short_is_refused_before_it_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "gate"
    GatePage.create(path).close()
    os.truncate(path, 2048)
    with pytest.raises(NotAPage, match="4096"):
        GatePage.open(path)


def test_what_cannot_be_opened_names_the_file_and_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(NoPage, match="stepguard run"):
        GatePage.open(tmp_path / "gate")
    with pytest.raises(Unreachable, match="run_dir"):
        GatePage.create(tmp_path / "missing" / "gate")
    (tmp_path / "folder").mkdir()
    with pytest.raises(Unreachable, match="folder"):
        GatePage.open(tmp_path / "folder")
    (tmp_path / "link").symlink_to("gate")
    GatePage.create(tmp_path / "gate").close()
    with pytest.raises(Unreachable, match="link"):
        GatePage.open(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GateError, match="pipe"):
        GatePage.open(tmp_path / "pipe")


FULL = """
import resource, sys
from stepguard.gate import GatePage, Unreachable
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
try:
    GatePage.create(sys.argv[1])
except Unreachable as error:
    print(error)
"""


def test_a_full_disk_is_found_out_when_the_page_is_made_and_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path / "gate")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "run_dir with space" in said, "the disk was not full"
    assert list(tmp_path.iterdir()) == []


MOUNTS = r"""
21 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
30 21 0:26 / /run rw,nosuid - tmpfs tmpfs rw
31 21 0:50 / /home rw shared:9 - nfs4 server:/home rw
32 31 0:51 / /home/local\040disk rw - xfs /dev/sdb rw
33 21 0:52 / /scratch rw - lustre mds@tcp:/scratch rw
34 33 0:53 / /scratch rw - tmpfs tmpfs rw
broken line
"""


@pytest.mark.parametrize(
    ("directory", "kind"),
    [
        ("/run/stepguard/a", "tmpfs"),
        ("/runner", "ext4"),
        ("/home/me", "nfs4"),
        ("/home/local disk/run", "xfs"),
        ("/scratch/x", "tmpfs"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(directory: str, kind: str) -> None:
    assert gate.file_system_of(Path(directory), MOUNTS) == kind


def test_network_file_systems_are_refused_with_a_better_place() -> None:
    with pytest.raises(NetworkFileSystem, match=r"/home/me/run/gate.*nfs4.*/run/stepguard"):
        gate.refuse_network(Path("/home/me/run/gate"), MOUNTS)
    gate.refuse_network(Path("/run/gate"), MOUNTS)
    assert gate.file_system_of(Path("/x"), "") is None


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, PAGE_BYTES // 2 - 1), flip=st.integers(1, 255))
def test_a_corrupted_byte_is_unknown_or_harmless_never_another_order(at: int, flip: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gate"
        page = GatePage.create(path)
        written = replace(GO, order=Order.HOLD, generation=7, reason="server_dead", judged_batch=3)
        page.publish(GO)
        page.publish(written)
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ flip]))
        assert page.daemon() in (None, written)
        page.close()


def test_a_corrupted_body_is_unknown_until_the_next_order(tmp_path: Path) -> None:
    page = GatePage.create(tmp_path / "gate")
    page.publish(GO)
    start = 64 + 992 + 16  # slot 1's body: the first write goes there
    with (tmp_path / "gate").open("r+b") as file:
        file.seek(start)
        assert file.read(1) == bytes([Order.GO])
        file.seek(start)
        file.write(bytes([Order.STOP]))
    assert page.daemon() is None
    page.publish(GO)
    assert page.daemon() == GO


def test_a_writer_killed_before_the_sequence_word_leaves_the_state_before_it(tmp_path: Path) -> None:
    page = GatePage.create(tmp_path / "gate")
    page.publish(GO)
    with (tmp_path / "gate").open("r+b") as file:
        file.seek(64)  # slot 0, which the next write would fill
        file.write(b"half a write" * 20)
    assert page.daemon() == GO
    page.publish(replace(GO, generation=2))
    assert page.daemon() == replace(GO, generation=2)


class Dying:
    """Memory under a writer that is killed at its first store."""

    def __setitem__(self, at: object, what: object) -> None:
        raise KeyboardInterrupt


def test_the_slot_is_written_before_the_word_that_names_it(tmp_path: Path) -> None:
    page = GatePage.create(tmp_path / "gate")
    page.publish(GO)
    page._view = Dying()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        page.publish(replace(GO, generation=2))
    assert GatePage.open(tmp_path / "gate").daemon() == GO


WRITER = """
import sys
from pathlib import Path
from stepguard.gate import DaemonHalf, GatePage, Order
page = GatePage.create(Path(sys.argv[1]))
seen = page.daemon()
n = 0 if seen is None else seen.generation
while True:
    n += 1
    page.publish(DaemonHalf(order=Order(n % 6), generation=n, reason=f"r{n}" * (n % 20), lease_deadline_ns=n,
        target_step=n, target_path=f"/ckpt/{n}", judged_batch=n, judged_step=n, judged_ok=bool(n % 2)))
    if seen is not page:
        seen = page
        print("writing", flush=True)
"""


def of_one_write(half: DaemonHalf) -> bool:
    n = half.generation
    return half == DaemonHalf(
        order=Order(n % 6),
        generation=n,
        reason=gate._cut(f"r{n}" * (n % 20), gate.REASON_BYTES_MAX).decode(),
        lease_deadline_ns=n,
        target_step=n,
        target_path=f"/ckpt/{n}",
        judged_batch=n,
        judged_step=n,
        judged_ok=bool(n % 2),
    )


@pytest.mark.e2e
def test_a_writer_killed_again_and_again_never_shows_a_mixed_state(tmp_path: Path) -> None:
    """12 writers in a row, each killed by SIGKILL while it writes as fast as it can, and read throughout."""
    path = tmp_path / "gate"
    GatePage.create(path).close()
    reader = GatePage.open(path, writable=False)
    newest = reads = killed = 0
    for round_number in range(12):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        until = time.monotonic() + 0.05 + 0.003 * round_number
        while time.monotonic() < until:
            half = reader.daemon()
            reads += 1
            assert half is not None
            assert of_one_write(half)
            assert half.generation >= newest
            newest = half.generation
        writer.kill()
        killed += writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        rest = reader.daemon()
        assert rest is not None
        assert of_one_write(rest)
        assert rest.generation >= newest
    assert killed == 12
    assert newest > 1000
    assert reads > 1000


def test_a_reason_is_cut_at_a_character_and_a_path_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    page = GatePage.create(tmp_path / "gate")
    page.publish(replace(GO, reason="é" * 300))
    half = page.daemon()
    assert half is not None
    assert half.reason == "é" * 80
    with pytest.raises(PathTooLong, match="symbolic link"):
        page.publish(replace(GO, generation=2, target_path="x" * (PATH_BYTES_MAX + 1)))
    assert page.daemon() == half
    page.publish(replace(GO, generation=3, reason="r" * 999, target_path="x" * PATH_BYTES_MAX))
    assert page.daemon() == replace(GO, generation=3, reason="r" * 160, target_path="x" * PATH_BYTES_MAX)


def test_a_path_that_is_no_utf8_comes_back(tmp_path: Path) -> None:
    page = GatePage.create(tmp_path / "gate")
    odd = replace(GO, target_path=os.fsdecode(b"/ckpt/\xff"))
    page.publish(odd)
    assert page.daemon() == odd


def test_a_lease_needs_something_to_vouch_for(tmp_path: Path) -> None:
    page = GatePage.create(tmp_path / "gate")
    with pytest.raises(GateError, match="publish an order"):
        page.renew_lease(1)


def test_the_sequence_word_moves_with_every_write_and_with_nothing_else(tmp_path: Path) -> None:
    page = GatePage.create(tmp_path / "gate")
    page.publish(GO)
    before = page.words[gate.SEQUENCE_WORD]
    page.report(TrainerHalf(pid=1))
    assert page.words[gate.SEQUENCE_WORD] == before
    page.publish(GO)
    assert page.words[gate.SEQUENCE_WORD] != before


def test_a_page_removed_or_recreated_is_noticed(tmp_path: Path) -> None:
    page = GatePage.create(tmp_path / "gate")
    assert not page.replaced()
    (tmp_path / "gate").unlink()
    assert page.replaced()
    GatePage.create(tmp_path / "gate").close()
    assert page.replaced()


def test_an_onlooker_cannot_write(tmp_path: Path) -> None:
    GatePage.create(tmp_path / "gate").publish(GO)
    onlooker = GatePage.open(tmp_path / "gate", writable=False)
    assert onlooker.daemon() == GO
    with pytest.raises(TypeError):
        onlooker.publish(GO)


def test_a_step_that_does_not_fit_its_word_is_unknown() -> None:
    for step in (None, -1, 2**55):
        assert gate.step_phase_word(step, Phase.TRAIN) == Phase.TRAIN
    assert gate.step_phase_word(0, Phase.HELD) == 1 << 8 | Phase.HELD
