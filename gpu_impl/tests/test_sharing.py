"""Who holds a page that was shared: tags of open pages, prefixes of full ones."""

import pytest

from helix_gpu.bookkeeping.sharing import OpenPages, SharedPrefix, fork_prefix, release_prefix


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


def test_forks_of_one_length_stand_on_one_prefix() -> None:
    """A second fork at the same pages joins; more pages stand on the prefix below."""
    first = fork_prefix(None, (2, 1))
    assert first == SharedPrefix((2, 1), None, 2)
    assert fork_prefix(first, (2, 1)) is first
    assert first.holders == 3
    taller = fork_prefix(first, (2, 2))
    assert taller == SharedPrefix((2, 2), first, 2)
    assert first.holders == 3


def test_requests_without_full_pages_share_no_prefix() -> None:
    """Nothing is full yet: there is no prefix to stand on."""
    assert fork_prefix(None, (0, 0)) is None
    assert fork_prefix(None, (0, 1)) is not None


def test_a_stem_held_alone_is_its_holders_own() -> None:
    """Who is left alone on a prefix gives its pages back by himself, and forks from there anew."""
    first = fork_prefix(None, (1,))
    assert release_prefix(first) is first
    again = fork_prefix(first, (3,))
    assert again == SharedPrefix((3,), None, 2)


def test_letting_go_leaves_the_part_that_others_hold() -> None:
    """The last on a prefix leaves it; what is below may still be held."""
    low = fork_prefix(None, (1,))
    high = fork_prefix(low, (2,))
    assert release_prefix(high) is high
    assert release_prefix(high) is low
    assert low.holders == 1
    assert release_prefix(low) is None
    assert release_prefix(None) is None


def test_lone_prefixes_are_absorbed() -> None:
    """Of a line of prefixes, those that one other alone stands on disappear."""
    low = fork_prefix(None, (1,))
    middle = fork_prefix(low, (2,))
    assert release_prefix(low) is low  # only the middle one stands on it now
    high = fork_prefix(middle, (3,))
    assert high == SharedPrefix((3,), middle, 2)
    assert middle.below is None


def test_a_stem_that_others_stand_on_stays() -> None:
    """Three forks of one request, later and later: the first keeps its pages when all else goes."""
    first = fork_prefix(None, (1,))
    second = fork_prefix(first, (2,))
    third = fork_prefix(second, (3,))
    assert release_prefix(second) is second
    assert release_prefix(third) is third
    assert release_prefix(third) is first
