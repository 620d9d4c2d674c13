"""Engines that fail on purpose, for tests of the drivers and the command line."""

import os
import signal
import subprocess
import sys
import time

import msgspec

from helix_conformance.engines.gpu import GpuEngine, LedgerEngine
from helix_reference.engine import ReferenceEngine
from helix_spec.engine import Outcome
from helix_spec.events import Decode


def write_over_the_servers_head(line):
    """Write to the stream of answers, which is a local variable of the process's main function."""
    frame = sys._getframe()
    while "answers" not in frame.f_locals:
        frame = frame.f_back
    os.write(frame.f_locals["answers"].fileno(), line)


class Liar(LedgerEngine):
    """Rank 1 claims one token more than it held."""

    def apply(self, event):
        outcome = super().apply(event)
        if self.rank == 1 and outcome.past_len:
            outcome = msgspec.structs.replace(outcome, past_len=[n + 1 for n in outcome.past_len])
        return outcome


class Raiser(LedgerEngine):
    """Rank 1 raises in an accepted decode."""

    def apply(self, event):
        outcome = super().apply(event)
        if self.rank == 1 and outcome.past_len:
            raise RuntimeError("the adapter lost its way")
        return outcome


class Malformed(LedgerEngine):
    """Rank 1 answers a decode with a column too short."""

    def apply(self, event):
        outcome = super().apply(event)
        return msgspec.structs.replace(outcome, slots=[]) if self.rank == 1 else outcome


class DistributedLiar(GpuEngine):
    """Rank 1 of the real implementation adds a little to its output."""

    def apply(self, event):
        outcome = super().apply(event)
        if self.rank == 1 and outcome.output is not None:
            outcome = msgspec.structs.replace(outcome, output=outcome.output + 0.125)
        return outcome


class Trouble(GpuEngine):
    """Rank 1 dies, raises or leaves out its peers, as the event's pad says.

    One engine for all, so that tests need few pools: the number of dummy requests of a decode
    picks what happens.
    """

    def apply(self, event):
        if self.rank == 1 and isinstance(event, Decode):
            match event.pad:
                case 1:
                    print("last words of rank 1", flush=True)
                    os.kill(os.getpid(), signal.SIGKILL)
                case 2:
                    raise RuntimeError("the adapter lost its way")
                case 3:
                    outcome = super().apply(Decode([99], [1]))  # refused: no collective
                    return outcome
        return super().apply(event)


class SlowReference(ReferenceEngine):
    """A reference that wants processes of its own, and so runs on any driver."""

    needs_processes = True

    @classmethod
    def join(cls, world_size):
        """Nothing to join."""


class Daemon(LedgerEngine):
    """Each rank leaves a process behind that has a session of its own and another parent."""

    def start(self, config, profiles):
        subprocess.Popen(["setsid", "--fork", "sleep", "3600"]).wait()
        return super().start(config, profiles)


class Mischief(LedgerEngine):
    """Rank 1 does something else than answer; the number of dummy requests of a decode says what.

    It needs no processes of its own, so it runs on every driver that has some.
    """

    def apply(self, event):
        mischief = getattr(event, "pad", 0)
        if self.rank == 1 or mischief == 10:
            match mischief:
                case 1:
                    print("last words of rank 1", file=sys.stderr, flush=True)
                    os.kill(os.getpid(), signal.SIGSEGV)
                case 2:
                    time.sleep(3600)
                case 3:
                    raise RuntimeError("the adapter lost its way")
                case 4:
                    sys.exit(0)
                case 5:
                    os._exit(0)
                case 6:
                    while True:
                        print("x" * 4096)
                case 7:
                    for _ in range(5000):
                        print("x" * 4096)
                case 8:
                    super().apply(event)  # and answer for another batch
                    return Outcome(None, [0, 0], [1, 1], [False, False], [-1, -1])
                case 9:
                    os.kill(os.getppid(), signal.SIGKILL)  # the supervisor
                    time.sleep(3600)
                case 10 if self.rank == 0:
                    os.kill(os.getppid(), signal.SIGKILL)
                    time.sleep(3600)
                case 11:
                    write_over_the_servers_head(b'{"type":"outcome","seq":99}\n')
                    time.sleep(3600)
        return super().apply(event)


class Haunted(ReferenceEngine):
    """What one object has seen, all later ones of its process know."""

    profiles = ReferenceEngine.profiles - {"cache", "attention"}
    events = 0

    def apply(self, event):
        Haunted.events += 1
        return super().apply(event)

    def observe(self, ids=None):
        view = super().observe(ids)
        return msgspec.structs.replace(view, free_pages=view.free_pages - (Haunted.events > 20))
