"""The daemon's stream: whatever the config names, its steps become events, once each, over a restart too."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from senses.test_readers import FORMATS, Make, csv_file, json_file
from senses.test_wandb_api import Server, history
from stepguardd.config import Config
from stepguardd.core.events import Event, RewardLogged
from stepguardd.sources.stream import RewardStream


def config(**stream: object) -> Config:
    return Config.model_validate({"stream": stream})


class Following:
    """The stream of a config; what it told is kept."""

    def __init__(self, settings: Config, position: str | None = None) -> None:
        self.told: list[RewardLogged] = []
        stream = RewardStream.of(settings, position, self.tell)
        assert stream is not None
        self.stream = stream

    def tell(self, event: Event) -> None:
        assert isinstance(event, RewardLogged)
        self.told.append(event)

    def look(self) -> list[tuple[int, float | None]]:
        asyncio.run(self.stream.look())
        return [(one.step, one.reward) for one in self.told]


@FORMATS
def test_every_format_that_can_be_read_can_be_followed(make: Make, tmp_path: Path) -> None:
    """It is waited for, told step by step, and read on by the next daemon where this one stood."""
    written = make(tmp_path, range(6))
    settings = config(path=str(written))
    moved = written.rename(tmp_path / "elsewhere")
    first = Following(settings)
    assert first.look() == []
    assert str(written) in str(first.stream.status(0.0)["trouble"])
    moved.rename(written)
    assert first.look() == [(step, step / 4) for step in range(6)]
    assert first.stream.notes == ()
    said = first.stream.status(1e9)
    assert (said["metric"], said["reward"], said["trouble"]) == ("reward", 1.25, None)
    assert Following(settings, first.told[-1].position).look() == []


def test_a_text_log_is_read_by_a_pattern_of_ones_own(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("epoch 3 | mean score 0.5\nnoise\nepoch 4 | mean score nan\n")
    settings = Config.model_validate(
        {
            "stream": {
                "path": str(log),
                "pattern": r"epoch (?P<step>\d+) \| mean (?P<metric>\w+) (?P<value>\S+)",
            },
            "reward": {"metric": "score"},
        }
    )
    (third, fourth) = Following(settings).look()
    assert third == (3, 0.5)
    assert repr(fourth) == "(4, nan)"


def test_where_another_stream_stood_is_no_place_in_this_one(tmp_path: Path) -> None:
    """The config names another file: it is read from its start."""
    first = Following(config(jsonl=str(json_file(tmp_path, range(9)))))
    assert len(first.look()) == 9
    other = Following(config(path=str(csv_file(tmp_path, range(3)))), first.told[-1].position)
    assert other.look() == [(step, step / 4) for step in range(3)]


def test_of_two_streams_one_is_followed_and_that_is_said(tmp_path: Path) -> None:
    settings = config(jsonl=str(json_file(tmp_path, range(2))), path=str(csv_file(tmp_path, range(5))))
    following = Following(settings)
    assert len(following.look()) == 2
    assert following.stream.notes == ("stream.path is not followed, since stream.jsonl is set",)


@pytest.mark.parametrize(
    ("stream", "complaint"),
    [
        ({"pattern": "(?P<value>.)"}, "path is missing"),
        ({"path": "a.log", "pattern": "("}, "no regular expression"),
        ({"path": "a.log", "pattern": "reward .*"}, r"needs a group \(\?P<value>"),
        ({"wandb_run": "me/p/abc"}, "wandb_secret is missing"),
        ({"wandb_run": "abc", "wandb_secret": "key"}, "wandb_run"),
        (
            {"wandb_run": "me/p/abc", "wandb_secret": "0123456789abcdef" * 2 + "01234567"},
            "does not belong here",
        ),
    ],
)
def test_a_stream_that_cannot_be_followed_is_refused(stream: dict[str, str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        config(**stream)


def test_a_run_on_wandbs_servers_is_followed_with_a_key_from_a_file(tmp_path: Path) -> None:
    """Against a server of the tests' own; a key that others can read is not used, and never shown."""
    server = Server()
    key = tmp_path / "key"
    key.write_text("secret-key\n")
    try:
        server.answer = history([{"_step": step, "train/reward": step / 4} for step in range(3)])
        settings = config(wandb_run="me/p/abc", wandb_secret=str(key), wandb_url=server.url)
        key.chmod(0o644)
        open_to_all = Following(settings)
        assert open_to_all.look() == []
        (trouble,) = open_to_all.stream.notes
        assert trouble.startswith(f"stream.wandb_secret: {key}")
        assert not server.questions
        key.chmod(0o600)
        assert open_to_all.look() == [(step, step / 4) for step in range(3)]
        assert open_to_all.stream.notes == ()
        assert "secret-key" not in str(open_to_all.stream.status(0.0))
    finally:
        server.close()
