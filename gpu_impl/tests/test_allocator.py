"""The page allocator."""

import pytest

from helix_gpu.bookkeeping.allocator import PageAllocator


@pytest.mark.holds("PAGE-2", "PAGE-3")
def test_pages_are_distinct_and_counted() -> None:
    """Pages taken are distinct and in range, and free + taken = pages."""
    allocator = PageAllocator(7)
    taken = allocator.take(3) + allocator.take(4)
    assert sorted(taken) == list(range(7))
    assert allocator.free == 0


def test_last_given_back_goes_out_first() -> None:
    """The page given back last is taken first, then those never taken."""
    allocator = PageAllocator(5)
    allocator.take(3)
    allocator.give_back([0, 2])
    assert allocator.take(3) == [2, 0, 3]


@pytest.mark.holds("PAGE-3")
def test_taking_too_many_takes_none() -> None:
    """A request for more pages than are free is an error and changes nothing."""
    allocator = PageAllocator(2)
    with pytest.raises(RuntimeError, match="3 pages were asked for and 2 are free"):
        allocator.take(3)
    assert allocator.free == 2


@pytest.mark.holds("PAGE-3")
@pytest.mark.parametrize("pages", [[0, 0], [1, 2], [5], [-1]])
def test_giving_back_what_is_not_taken_gives_none(pages: list[int]) -> None:
    """Double frees, free pages and pages outside the pool are errors and change nothing."""
    allocator = PageAllocator(3)
    allocator.take(2)
    with pytest.raises(RuntimeError, match="given back"):
        allocator.give_back(pages)
    assert allocator.free == 1


@pytest.mark.holds("PAGE-3")
def test_shared_pages_are_free_when_the_last_holder_lets_go() -> None:
    """A page with three holders goes back with the third."""
    allocator = PageAllocator(4)
    pages = allocator.take(2)
    allocator.share(pages)
    allocator.share(pages[:1])
    allocator.give_back(pages)
    assert allocator.free == 2
    allocator.give_back(pages)
    assert allocator.free == 3
    allocator.give_back(pages[:1])
    assert allocator.free == 4


def test_a_large_pool_costs_nothing() -> None:
    """A pool of 2**31 - 1 pages needs no list of them."""
    assert PageAllocator(2**31 - 1).free == 2**31 - 1
