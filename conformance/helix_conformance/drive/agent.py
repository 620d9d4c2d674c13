"""torchrun for one machine, without a network: `python -m helix_conformance.drive.agent OPTION...`.

Takes what torchrun takes. Its own rendezvous opens a store on all interfaces, and unpickles what
lies there; with one agent nobody has to be met, and the store is a dictionary of this process.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from typing import Any, Final

from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in the stub
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.run import parse_args, run

NAME: Final = "helix-alone"
"""What torchrun calls this rendezvous."""


class Alone(RendezvousHandler):
    """The meeting of one agent with nobody.

    Parameters
    ----------
    parameters : RendezvousParameters
        What torchrun was told.
    """

    def __init__(self, parameters: RendezvousParameters) -> None:
        self.run_id = parameters.run_id
        self.store = HashStore()

    def get_backend(self) -> str:
        """Return the name of this rendezvous."""
        return NAME

    def get_run_id(self) -> str:
        """Return the name of this run."""
        return self.run_id

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the only place of the only agent; nobody listens where the ranks are told to."""
        return RendezvousInfo(self.store, 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def is_closed(self) -> bool:
        """Return whether no more agents may come."""
        return False

    def set_closed(self) -> Any:
        """Do nothing: none comes anyway."""

    def num_nodes_waiting(self) -> int:
        """Return how many agents have come too late."""
        return 0

    def shutdown(self) -> bool:
        """Return whether nothing is left open."""
        return True


if __name__ == "__main__":
    rendezvous_handler_registry.register(NAME, Alone)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    here = [
        f"--rdzv-backend={NAME}",
        f"--rdzv-id={uuid.uuid4().hex}",
        "--rdzv-endpoint=127.0.0.1:0",
    ]
    here += ["--local-addr=127.0.0.1", f"--log-dir={os.devnull}"]
    try:
        run(parse_args([*here, *sys.argv[1:]]))  # type: ignore[no-untyped-call]
    except ChildFailedError:
        sys.exit(1)  # rank 0 has said what there is to say
