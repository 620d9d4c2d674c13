"""What tests of the suite share; the wheel does not hold it.

Engines that are named as `module:Class`, for every process that can import the suite:

- `broken`: engines that fail on purpose, for the drivers and the command line;
- `faulty`: engines to which something happens in the middle of an event;
- `block`: engines that play the transformer block of `gpu_testing.block`;

and, beside them:

- `stray`: a command that stands before the C engine and goes astray;
- `sabotage`: signals to worker processes, once they are in a step;
- `inputs`: every parser, with valid and hostile inputs;
- `index`: the page that lists what holds each invariant, and its check;
- `docstrings`: what a package's docstrings lack, for the tests of all packages;
- `marks`: the invariants that profiles check, for the marker `holds`;
- `kernel_cases`: tests of the suite on the interpreted kernels, run in a process of their own.
"""
