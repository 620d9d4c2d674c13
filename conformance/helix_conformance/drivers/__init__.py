"""Where the ranks of an engine live.

- `base`: what a driver does, and how an engine's failure is reported;
- `local`: all ranks in this process, one event at a time;
- `threads`: the same, a thread for each rank, with an exchange among them;
- `pool`: worker processes over gloo, started once and kept;
- `torchrun`: one supervisor per launched process, its engine in a child;
- `worker`, `wire`: the child process and the frames it speaks.
"""
