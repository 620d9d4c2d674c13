"""The conformance suite: any engine's placement, pages, cache and attention against the spec.

- `protocol`: what an engine is, its profiles, how one is named on the command line;
- `generate`: layouts, configurations and traces as functions of choices, made from a seed for runs
  or by Hypothesis; `testing`: strategies and a state machine for an engine's own tests;
- `numbers`: Q, K and V as arrays, the exact attention and its error bound;
- `judge`: every answer of every rank against the reference, invariant by invariant;
- `drivers`: where the ranks live (this process, a pool of workers, torchrun);
- `runs`: random traces, stored traces and workloads through a driver; `coverage`: where they
  have been; `reduction`: a failing trace made small; `trials`: what is really to blame;
- `known`: the ledger of what an engine is known to answer wrongly;
- `workloads`: production request traces as events;
- `vectors`: cases as JSON for any language, and their check;
- `zoo`: engines that are wrong on purpose, to measure the suite;
- `plugin`, `suite`: the same as tests of pytest, in an engine's own repository;
- `report`, `show`, `cli`: what a user sees; `reports`: pages and files made of a run's stream.
"""

from typing import Final

__version__: Final = "0.1.0"
"""The suite's version, as in pyproject.toml: code that runs from a path has no metadata."""
