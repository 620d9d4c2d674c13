"""Block tables: rows of page numbers that grow."""

import numpy as np

from helix_gpu.bookkeeping.block_tables import BlockTables


def ints(*numbers: int) -> np.ndarray:
    """An int64 array."""
    return np.array(numbers, dtype=np.int64)


def test_what_was_written_is_read() -> None:
    """Pages stand where they were put, whatever rows and columns the table grew by since."""
    tables = BlockTables()
    tables.begin(2, [6, 7])
    tables.begin(0, [8])
    tables.write(ints(2, 0), ints(1, 1), [5, 4])
    tables.begin(5, [])
    tables.write(ints(5), ints(9), [9])
    assert tables.page(ints(2, 0, 0), ints(1, 0, 1)).tolist() == [5, 8, 4]
    assert tables.read(ints(0, 2), 2).tolist() == [[8, 4], [6, 5]]
    assert tables.read(ints(5), 10)[0, 9] == 9
    assert tables.lists(ints(2, 5, 0), ints(1, 0, 2)) == [[6], [], [8, 4]]


def test_reading_beyond_what_was_written() -> None:
    """Pages that nobody wrote are there, of page numbers that exist."""
    tables = BlockTables()
    tables.begin(3, [])
    assert tables.read(ints(3), 3).tolist() == [[0, 0, 0]]
    assert tables.read(ints(), 4).shape == (0, 4)
    tables.write(ints(), ints(), [])
    assert tables.read(ints(0), 4).tolist() == [[0, 0, 0, 0]]


def test_a_copy_goes_its_own_way() -> None:
    """A copied row has the source's pages, and either may change alone."""
    tables = BlockTables()
    tables.begin(0, [4, 5])
    tables.copy(0, 6)
    tables.write(ints(6), ints(1), [3])
    assert tables.read(ints(0, 6), 2).tolist() == [[4, 5], [4, 3]]


def test_tables_are_as_large_as_needed_or_twice_as_large_as_before() -> None:
    """Growth by doubling copies the table a few times only; nothing grows without need."""
    tables = BlockTables()

    def size() -> tuple[int, ...]:
        return tables._pages.shape

    tables.write(ints(), ints(), [])
    tables.begin(0, [])
    assert size() == (1, 0)
    tables.begin(2, [1])
    assert size() == (3, 1)
    tables.write(ints(0, 2), ints(4, 2), [1, 1])
    assert size() == (3, 5)
    tables.read(ints(2), 5)
    tables.begin(2, [1, 2, 3, 4, 5])
    tables.copy(0, 2)
    assert size() == (3, 5)
    tables.copy(0, 3)
    assert size() == (6, 5)
    tables.read(ints(3), 6)
    assert size() == (6, 10)
    tables.begin(13, [1])
    assert size() == (14, 10)
    tables.begin(14, [1] * 10)
    assert size() == (28, 10)


def test_nothing_is_copied_that_has_room() -> None:
    """A table without rows or pages stays so, and one that is large enough stays where it is."""
    tables = BlockTables()
    assert tables._pages.shape == (0, 0)
    tables.write(ints(), ints(), [])
    assert tables._pages.shape == (0, 0)
    tables.begin(0, [])
    tables.copy(0, 4)
    assert tables._pages.shape == (5, 0)
    tables.begin(4, [1, 2])
    before = tables._pages
    tables.write(ints(0), ints(0), [3])
    tables.read(ints(0, 4), 1)
    tables.copy(4, 1)
    tables.begin(4, [5, 6])
    assert before is tables._pages
