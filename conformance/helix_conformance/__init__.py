"""The conformance suite: any engine's placement, pages, cache and attention against the spec.

- `protocol`: what an engine is, its profiles, how one is named on the command line;
- `strategies`: Hypothesis strategies for layouts, configurations and traces; `machine`: the
  same as a state machine;
- `numbers`: Q, K and V as arrays, the exact attention and its error bound;
- `judge`: every answer of every rank against the reference, invariant by invariant;
- `drivers`: where the ranks live (this process, a pool of workers, torchrun);
- `runs`: random traces, stored traces and workloads through a driver;
- `workloads`: production request traces as events;
- `report`, `cli`: what a user sees.
"""
