"""Where the ranks of an engine live.

- `base`: what a driver does, and how an engine's failure is reported;
- `opening`: from the name of an engine, and of a driver, to a driver that holds it;
- `asking`: one rank's engine asked in this process, and what counts as an answer;
- `local`: all ranks in this process, one event at a time;
- `threads`: the same, a thread for each rank, with an exchange among them;
- `stdio`, `messages`: children of any language that speak PROTOCOL.md; `serve`: one of them for a
  Python engine;
- `pool`: worker processes over gloo, started once and kept;
- `group`, `process`: what drivers with a process for each rank share: whole traces go out, and
  someone is to blame;
- `supervised`, `lines`: one supervisor per launched process, its engine in a child; `torchrun` and
  `mpi` say how they meet, `launching` launches them;
- `worker`, `wire`: the child process and the frames it speaks.
"""
