"""Who holds a page that was shared: tags of open pages, stems of full ones."""

import pytest

from helix_gpu.bookkeeping.sharing import OpenPages, Stem, branch, let_go


def test_a_tag_lives_as_long_as_somebody_shares() -> None:
    """Joining gives a tag two holders; it is forgotten when the last has left."""
    pages = OpenPages()
    tag = pages.join(0)
    assert tag == 1
    assert pages.join(tag) == tag
    assert pages.holders == {tag: 3}
    assert [pages.leave(tag) for _ in range(3)] == [True, True, False]
    assert pages.holders == {}
    assert pages.join(0) == 2


@pytest.mark.holds("PAGE-2")
def test_the_last_writer_of_all_holders_copies_nothing() -> None:
    """Writers one after the other copy, but for the one who finds nobody else in the page."""
    pages = OpenPages()
    tag = pages.join(pages.join(0))
    other = pages.join(0)
    assert pages.must_copy([tag, other, tag, tag]) == [True, True, True, False]
    assert pages.must_copy([tag, tag]) == [True, True]


def test_forks_of_one_length_stand_on_one_stem() -> None:
    """A second fork at the same pages joins; more pages stand on the stem below."""
    first = branch(None, (2, 1))
    assert first == Stem((2, 1), None, 2)
    assert first is branch(first, (2, 1))
    assert first.holders == 3
    taller = branch(first, (2, 2))
    assert taller == Stem((2, 2), first, 2)
    assert first.holders == 3


def test_requests_without_full_pages_share_no_stem() -> None:
    """Nothing is full yet: there is no stem to stand on."""
    assert branch(None, (0, 0)) is None
    assert branch(None, (0, 1)) is not None


def test_a_stem_held_alone_is_its_holders_own() -> None:
    """Who is left alone on a stem gives its pages back by himself, and forks from there anew."""
    first = branch(None, (1,))
    assert first is let_go(first)
    again = branch(first, (3,))
    assert again == Stem((3,), None, 2)


def test_letting_go_leaves_the_part_that_others_hold() -> None:
    """The last on a stem leaves it; what is below may still be held."""
    low = branch(None, (1,))
    high = branch(low, (2,))
    assert high is let_go(high)
    assert low is let_go(high)
    assert low.holders == 1
    assert let_go(low) is None
    assert let_go(None) is None


def test_lone_stems_are_swallowed() -> None:
    """Of a line of stems, those that one other alone stands on disappear."""
    low = branch(None, (1,))
    middle = branch(low, (2,))
    assert low is let_go(low)  # only the middle one stands on it now
    high = branch(middle, (3,))
    assert high == Stem((3,), middle, 2)
    assert middle.below is None


def test_a_stem_that_others_stand_on_stays() -> None:
    """Three forks of one request, later and later: the first keeps its pages when all else goes."""
    first = branch(None, (1,))
    second = branch(first, (2,))
    third = branch(second, (3,))
    assert second is let_go(second)
    assert third is let_go(third)
    assert first is let_go(third)
