"""Fixtures: one pool of gloo workers for the whole session."""

import pytest


@pytest.fixture(scope="session")
def gpu_pool():
    """Four gloo workers that hold this project's implementation."""
    from helix_conformance.drive.process import PoolDriver

    driver = PoolDriver("gpu", 4)
    yield driver
    driver.close()
