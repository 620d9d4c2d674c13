"""The specification of sharded decode KV caches: words, closed forms, invariants, traces.

`SPEC.md` beside this file is the normative text. The modules, in reading order:

- `layouts`: a placement rule as data, the named layouts, layout identifiers;
- `configs`: what an engine is started with, and when it must refuse to start;
- `events`: the trace language, the reasons of refusals, what an engine answers;
- `traces`: the JSON form of a trace and its schema;
- `placement`: closed forms, which rank and slot holds which position;
- `invariants`: the numbered invariants as predicates over observations;
- `values`: the numbers that stand in for Q, K and V.

Nothing is imported here, so that `helix_gpu`, which may use the vocabulary (`layouts`,
`configs`, `events`) and nothing else, does not load the arithmetic by accident.
"""
