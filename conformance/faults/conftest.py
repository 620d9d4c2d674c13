"""Fixtures: four gloo workers that say where they are, and a folder for that."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from suite_testing.sabotage import DEADLINE_S


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder for the beacons of workers; and signals that end a child, as a terminal's do.

    What runs in the background of a shell script or under nohup ignores them, its children too.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ["HELIX_FAULTS_BEACONS"] = str(tmp_path_factory.mktemp("beacons"))


@pytest.fixture(scope="session")
def pool() -> Iterator[object]:
    """Four gloo workers that say where they are."""
    from helix_conformance.drive.process import PoolDriver

    driver = PoolDriver("suite_testing.faulty:Beacon", 4, deadline_s=DEADLINE_S)
    yield driver
    driver.close()
