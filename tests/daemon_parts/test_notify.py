"""What systemd hears from the daemon, word for word."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepguardd.notify import Notifier


@pytest.fixture
def manager() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.settimeout(5)
        yield listener


def test_it_speaks_sd_notify_and_repeats_no_status(manager: socket.socket, tmp_path: Path) -> None:
    manager.bind(str(tmp_path / "notify"))
    notifier = Notifier.from_env({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    notifier.ready()
    notifier.alive("closed")
    notifier.alive("closed")
    notifier.alive("open")
    notifier.stopping()
    assert [manager.recv(200) for _ in range(5)] == [
        b"READY=1",
        b"WATCHDOG=1\nSTATUS=closed",
        b"WATCHDOG=1",
        b"WATCHDOG=1\nSTATUS=open",
        b"STOPPING=1",
    ]


def test_an_abstract_socket_is_spoken_to(manager: socket.socket, tmp_path: Path) -> None:
    name = f"stepguard{tmp_path}"
    manager.bind(f"\0{name}")
    Notifier(f"@{name}").ready()
    assert manager.recv(200) == b"READY=1"


def test_a_child_inherits_nothing_of_it() -> None:
    environ = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "PATH": "/bin"}
    Notifier.from_env(environ)
    assert environ == {"PATH": "/bin"}


@pytest.mark.parametrize("address", [None, "", "/nonexistent/notify"])
def test_where_nobody_listens_nothing_happens(address: str | None) -> None:
    notifier = Notifier(address)
    notifier.ready()
    notifier.alive("closed")
    notifier.stopping()
