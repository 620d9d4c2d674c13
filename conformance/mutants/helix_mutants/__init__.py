"""Mutants: engines that are wrong in ways in which engines really were, to measure the suite.

- `parts`: what a mutant is made of, and the list of all of them;
- `on_ledger`, `on_model`, `on_cache`: the mutants, by what they are a wrong version of;
- `on_corners`, `on_edges`: those that need several things to come together, and those that escaped;
- `run`: the suite against every mutant, as a table and as JSON;
- `command`: the same as `helix-conformance zoo`.

A mutant is one class. Its docstring says what is wrong, its decorator where that was seen and
the invariants by one of which the suite is expected to name it.
"""
