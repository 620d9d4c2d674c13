"""Fixtures: one pool of gloo workers for the whole session."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _workers_find_broken_engines():
    """Worker processes import `broken_engines` by name."""
    before = os.environ.get("PYTHONPATH")
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = here if before is None else os.pathsep.join([here, before])
    yield
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="session")
def gpu_pool():
    """Four gloo workers that hold this project's implementation."""
    from helix_conformance.drive.process import PoolDriver

    driver = PoolDriver("gpu", 4)
    yield driver
    driver.close()
