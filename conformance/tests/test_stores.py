"""Frames between supervisors: any size, whole or not at all."""

import pytest

from helix_conformance.drivers import stores


def test_frames_larger_than_a_part_arrive_whole():
    """Frames of no bytes, of one part and of several come back as they were sent."""
    hosted = stores.hosted_store()
    store = stores.joined_store("127.0.0.1", hosted.port, "test")
    for size in (0, 1, stores.PART, 2 * stores.PART + 1):
        frame = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        stores.write(store, f"key-{size}", frame)
        assert frame == stores.read(store, f"key-{size}", 5)


def test_missing_frame_is_not_waited_for_longer_than_allowed():
    """A frame that never comes ends in an error."""
    hosted = stores.hosted_store()
    store = stores.joined_store("127.0.0.1", hosted.port, "test")
    with pytest.raises(RuntimeError):
        stores.read(store, "never", 0.2)
