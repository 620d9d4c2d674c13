"""The specification of sharded decode KV caches: words, closed forms, invariants, traces.

`SPEC.md` beside this file is the normative text. The modules, in reading order:

- `layouts`: a placement rule as data, the named layouts, layout identifiers;
- `config`: what an engine is started with, and when it must refuse to start;
- `events`: the trace language, and the reasons of refusals;
- `engine`: the calls of an engine, its profiles, and what it returns;
- `capabilities`: where an engine says that it works, and in what it differs rightly;
- `trace`: the JSON form of a trace, and its schema (`trace.schema.json`);
- `placement`: closed forms, which rank and slot holds which position;
- `values`: the numbers that stand in for Q, K and V;
- `invariants`: the sentences of the numbered invariants, and predicates of reported numbers;
- `theorems`: what is proved of all this for all sizes; its own `__init__` lists its modules.

Nothing is imported here, so that `helix_gpu`, which may use the vocabulary (`layouts`,
`config`, `events`, `engine`) and nothing else, does not load the arithmetic by accident.
"""
