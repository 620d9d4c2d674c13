"""What an engine is asked: random traces, and production traces.

- `choices`: the choices that everything random is a function of, made from a seed;
- `configs`: layouts, model shapes and configurations, legal and illegal;
- `actions`: what a scheduler means to do next, a class for each kind;
- `traces`: lists of actions, played once on a recorder; merges;
- `strategies`: the same functions, their choices made by Hypothesis;
- `workload`: real request lengths, and a scheduler that batches them.
"""
