"""Drivers: how the ranks of an engine are started, asked and ended.

- `driver`: what a driver does, and how an engine's failure is reported;
- `blame`: which rank is named when several fail or are silent;
- `opening`: from the name of an engine, and of a driver, to a driver that holds it;
- `asking`: one rank's engine asked in this process, and what counts as an answer;
- `in_process`: all ranks in this process, one after the other;
- `threads`: the same, a thread for each rank, with an exchange among them;
- `messages`: PROTOCOL.md, in types; `serve`: a Python engine that speaks it;
- `process`: ranks in processes that speak it: commands of any language, and a pool over gloo;
- `launched`: ranks that torchrun or mpiexec launches, each supervised by the process that is
  launched; `meeting`: how such processes find each other.
"""
