"""Fixtures: four gloo workers that say where they are, and what they find on their path."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for `sabotage` and `faulty_engines`


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Workers find `faulty_engines`, and a folder for their beacons."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    os.environ["HELIX_FAULTS_BEACONS"] = str(tmp_path_factory.mktemp("beacons"))


@pytest.fixture(scope="session")
def pool() -> Iterator[object]:
    """Four gloo workers that say where they are."""
    from sabotage import DEADLINE_S

    from helix_conformance.drive.process import PoolDriver

    driver = PoolDriver("faulty_engines:Beacon", 4, deadline_s=DEADLINE_S)
    yield driver
    driver.close()
