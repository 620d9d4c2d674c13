"""A program that ends with whoever started it, run as `python -I -S leash.py HOW PARENT WORD...`.

It says so to the system, becomes the parent of all that its descendants leave behind, and turns
into the program. HOW is `-`, or `apart`: the program then has a network of its own, the loopback
alone. It is a file that needs nothing of ours, so that it costs a child 15 ms, not our imports.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Final

PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
"""Of <sys/prctl.h>."""
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWNET: Final = 0x40000000
"""Of <sched.h>."""
SIOCSIFFLAGS: Final = 0x8914
IFF_UP: Final = 1
"""Of <linux/sockios.h> and <net/if.h>."""
NO_NETWORK: Final = (
    "{0} would listen on all interfaces, and this system gives it no network of its own ({1}): "
    "start it yourself, around this command."
)
NOT_STARTED: Final = 127
"""As a shell has it of a program that it cannot start."""


def control(option: int, value: int) -> None:
    """Call prctl, where there is one.

    Parameters
    ----------
    option, value : int
        Its first two arguments.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def leave_the_network() -> None:
    """Move this process into a network of its own, in which there is the loopback alone.

    Raises
    ------
    OSError
        When the system does not let a process do so.
    """
    user, group = os.getuid(), os.getgid()
    system = ctypes.CDLL(None, use_errno=True)
    if system.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    # Everybody stays who they are.
    for name, text in (
        ("uid_map", f"{user} {user} 1"),
        ("setgroups", "deny"),
        ("gid_map", f"{group} {group} 1"),
    ):
        Path("/proc/self", name).write_text(text)
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


def main(how: str, parent: str, *command: str) -> None:
    """Become the command. Where that cannot be, end with status 127 and a sentence.

    Parameters
    ----------
    how : str
        `-`, or `apart` for a network of its own.
    parent : str
        Process id of who has started this one.
    *command : str
        The program and its arguments.
    """
    control(PR_SET_PDEATHSIG, signal.SIGKILL)
    control(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != int(parent):
        sys.exit(NOT_STARTED)  # it has ended before it could be asked to tell
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # what Python ignores, a program would inherit
    try:
        if how == "apart":
            leave_the_network()
    except OSError as error:
        print(NO_NETWORK.format(command[0], error.strerror), file=sys.stderr)
        sys.exit(NOT_STARTED)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}.", file=sys.stderr)
        sys.exit(NOT_STARTED)


if __name__ == "__main__":
    main(*sys.argv[1:])
