"""What is wrong with an engine's answers.

- `failure`: violations of invariants, and the failure that a run shows;
- `placement`, `lengths`, `pages`, `cache`, `attention`: one file a profile, each comparing what it
  checks; `judge`: all of them, event by event;
- `xfail`: failures of an engine that are expected;
- `coverage`: the situations that traces have visited;
- `shrink`: a failing trace made small; `causes`: what is really to blame;
- `play`: a trace, a vector or a workload through a driver, every answer judged.
"""
