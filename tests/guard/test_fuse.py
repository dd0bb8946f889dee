"""The fuse of killing calls, as a pure count."""

from __future__ import annotations

from stepguard.fuse import AT_ONCE_S, Blown, CallFuse


def counted(
    *, calls: int, hung: int, fuse: CallFuse | None = None, at_s: float = 0.0, each: int = 1
) -> CallFuse:
    """So many calls, `each` of them of one actor, that began at one moment and ended ten seconds later."""
    fuse = fuse or CallFuse()
    numbers = [fuse.begun(at_s, index // each) for index in range(calls)]
    for index, number in enumerate(numbers):
        fuse.ended(number, at_s + 10, hung=index < hung)
    return fuse


def test_ten_hung_calls_of_two_hundred_are_their_actors() -> None:
    assert counted(calls=200, hung=10).blown(0.1, 10.0) is None


def test_more_than_the_share_is_a_mass() -> None:
    assert counted(calls=200, hung=21).blown(0.1, 10.0) == Blown(failed=21, calls=200)


def test_two_of_four_are_never_a_mass() -> None:
    assert counted(calls=4, hung=2).blown(0.1, 10.0) is None


def test_what_waits_at_one_or_two_hung_actors_is_no_mass_while_another_works() -> None:
    assert counted(calls=32, hung=8, each=8).blown(0.1, 10.0) is None
    assert counted(calls=32, hung=16, each=8).blown(0.1, 10.0) is None
    assert counted(calls=32, hung=24, each=8).blown(0.1, 10.0) == Blown(failed=24, calls=32)


def test_where_every_actor_hangs_it_is_a_mass_however_few_there_are() -> None:
    assert counted(calls=16, hung=16, each=8).blown(0.1, 10.0) == Blown(failed=16, calls=16)


def test_a_share_of_one_still_kills_no_more_than_half() -> None:
    assert counted(calls=20, hung=10).blown(1.0, 10.0) is None
    assert counted(calls=20, hung=11).blown(1.0, 10.0) == Blown(failed=11, calls=20)


def test_calls_that_still_run_were_beside_them() -> None:
    fuse = CallFuse()
    for number in range(40):
        fuse.begun(0.0, number)
    counted(calls=4, hung=4, fuse=fuse)
    assert fuse.blown(0.1, 10.0) is None
    assert fuse.blown(0.05, 10.0) == Blown(failed=4, calls=44)


def test_calls_that_were_over_before_the_first_hung_one_began_say_nothing() -> None:
    fuse = counted(calls=1000, hung=0)
    counted(calls=20, hung=5, fuse=fuse, at_s=11.0)
    assert fuse.blown(0.1, 21.0) == Blown(failed=5, calls=20)


def test_failures_far_apart_are_no_mass() -> None:
    fuse = CallFuse()
    for second in range(0, 200, 20):
        counted(calls=1, hung=1, fuse=fuse, at_s=float(second))
        assert fuse.blown(0.1, second + 10.0) is None
    counted(calls=3, hung=3, fuse=fuse, at_s=1000.0)
    assert fuse.blown(0.1, 1010.0) is not None
    assert fuse.blown(0.1, 1010.0 + AT_ONCE_S + 1) is None


def test_its_memory_has_a_bound() -> None:
    fuse = counted(calls=10_000, hung=10_000)
    blown = fuse.blown(0.1, 10.0)
    assert blown is not None
    assert blown.failed < 5_000
