"""The picture in a report: whole XML whatever was logged, and its values can be read."""

from math import isfinite
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepguardd.incidents.chart import picture, ticks
from stepguardd.incidents.report import Curve

VALUES = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 1))


def curve(
    values: list[float | None], attempts: list[int] | None = None, steps: list[int] | None = None
) -> Curve:
    count = len(values)
    return Curve(
        steps=tuple(steps or range(1, count + 1)),
        values=tuple(values),
        attempts=tuple(attempts or [0] * count),
        refused=((count + 1, None, "failed_fraction"), (count + 2, 0.25, "<b>&")),
        saved=(2, 4000),
        held=(count, count + 1),
        onset=count,
    )


def drawn(one: Curve, window: tuple[int, int] | None = None) -> ET.Element:
    return ET.fromstring(picture(one, window or (0, len(one.steps)), "3 s"))


def classes(root: ET.Element, name: str) -> list[ET.Element]:
    return [node for node in root.iter() if name in node.get("class", "").split()]


@given(st.lists(VALUES, min_size=1, max_size=60))
def test_any_rewards_are_drawn_with_their_values(values: list[float | None]) -> None:
    root = drawn(curve(values))
    known = [value for value in values if value is not None and isfinite(value) and abs(value) < 1e100]
    assert len(classes(root, "dot")) == len(known)
    assert "nan" not in ET.tostring(root, encoding="unicode").replace("nanchor", "")


def test_what_happened_is_marked_and_says_what_it_is() -> None:
    root = drawn(curve([0.1, 0.2, 0.3, None, 0.4]))
    titles = [node.text for node in root.iter("title")]
    assert "step 2: reward 0.2" in titles
    assert "checkpoint of step 2" in titles
    assert "step 6: batch refused (failed fraction), its reward was unknown" in titles
    assert "step 7: batch refused (<b>&), its reward was 0.25" in titles
    assert len(classes(root, "line")) == 2, "an unknown value is a gap"
    assert classes(root, "held")
    assert root[0].get("aria-label") == "The reward of steps 1 to 5; held after step 5 for 3 s"


def test_steps_that_were_taken_back_are_dashed_and_the_new_ones_a_line_of_their_own() -> None:
    one = curve([0.1, 0.2, 0.3, 0.4, 0.25, 0.35], [0, 0, 0, 0, 1, 1], [1, 2, 3, 4, 3, 4])
    lines = classes(drawn(one), "line")
    assert [node.get("class") for node in lines] == ["line", "line void", "line"]
    assert [len(node.get("points", "").split()) for node in lines] == [2, 3, 2]


def test_of_a_long_run_the_whole_is_drawn_small_and_a_dip_is_kept() -> None:
    values: list[float | None] = [0.8] * 4000
    values[1234] = 0.01
    root = drawn(curve(values), (3900, 4000))
    (whole,) = classes(root, "thin")
    points = [tuple(map(float, pair.split(","))) for pair in whole.get("points", "").split()]
    assert len(points) < 1500
    assert max(y for _, y in points) - min(y for _, y in points) > 20
    assert classes(root, "window")


def test_nothing_is_drawn_of_nothing() -> None:
    assert picture(curve([]), (0, 0), "3 s") == ""


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 12))
def test_ticks_are_inside_and_not_too_many(low: float, width: float, most: int) -> None:
    high = low + width
    found = ticks(low, high, most)
    assert len(found) <= most + 1
    assert all(low - 1e-6 * abs(low) - 1e-9 <= tick <= high + 1e-6 * abs(high) + 1e-9 for tick in found)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (5.0, 5.0, [5.0])]
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5) == pytest.approx(expected)
