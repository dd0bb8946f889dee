"""Messages between the server's processes arrive whole, however the bytes are cut."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepguard_grpo.server.exposition import Histogram, sample
from stepguard_grpo.server.wire import MAX_MESSAGE_BYTES, Inbox, pack

MESSAGES = st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=20)), max_size=5)


@given(messages=MESSAGES, size=st.integers(1, 40))
def test_messages_arrive_whole_and_in_order(messages: list[dict[str, object]], size: int) -> None:
    stream = b"".join(pack(message) for message in messages)
    inbox = Inbox()
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    assert [message for piece in pieces for message in inbox.feed(piece)] == messages


def test_an_absurd_length_is_refused() -> None:
    with pytest.raises(ValueError, match="announced"):
        Inbox().feed(struct.pack("<I", MAX_MESSAGE_BYTES + 1))


def test_histograms_are_cumulative_and_labels_escaped() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    counts = [line.rsplit(" ", 1)[1] for line in histogram.lines("name", ())]
    assert counts == ["2.0", "3.0", "4.0", "12.0", "4.0"]
    assert sample("name", 1, (("model", 'a"b\\c\n'),)) == 'name{model="a\\"b\\\\c\\n"} 1.0'
