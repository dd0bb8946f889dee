"""What an agent tells: every event of a guard and of a machine arrives as it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepguardd.cluster.told import OF_THE_MACHINE, OF_THE_TRAINER, event_of, message_of
from stepguardd.cluster.wire import WireError
from stepguardd.core.events import BatchReported, Event, RewardLogged, RolloutsLost

HERE, THERE = 1000.0, 70.0


@given(st.one_of([st.from_type(kind) for kind in (*OF_THE_TRAINER, *OF_THE_MACHINE)]))
def test_an_event_arrives_as_it_was_told(told: Event) -> None:
    names = [field.name for field in fields(told) if isinstance(getattr(told, field.name), Mapping)]
    told = replace(told, **{name: dict(getattr(told, name)) for name in names})
    if isinstance(told, BatchReported | RolloutsLost):
        told = replace(told, began=THERE - 5)
    heard = event_of(json.loads(json.dumps(message_of(told, THERE))), HERE)
    if isinstance(told, BatchReported | RolloutsLost):
        told = replace(told, began=HERE - 5)  # five seconds ago, by either machine's clock
    assert repr(heard) == repr(told), "compared as text: NaN is equal to nothing"


def test_what_another_version_tells_is_passed_over() -> None:
    unknown = RewardLogged(step=1, reward=0.5)
    assert event_of(message_of(unknown, THERE), HERE) is None
    assert event_of({"name": "NeverHeardOf", "body": {}}, HERE) is None


@pytest.mark.parametrize(
    "message",
    [
        {"name": "StepCommitted", "body": {}},
        {"name": "StepCommitted", "body": None},
        {"name": "RolloutsLost", "body": {"attempt": 0, "began": 1.0}},
    ],
)
def test_an_event_with_other_fields_ends_the_connection(message: dict[str, object]) -> None:
    with pytest.raises(WireError):
        event_of(message, HERE)
