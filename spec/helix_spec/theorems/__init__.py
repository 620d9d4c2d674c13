"""Theorems: what the specification claims for all sizes, proved on the functions that run.

`helix-conformance prove` confirms them all; `python -m helix_spec.theorems ID` confirms one. The
modules, in reading order:

- `base`: what a theorem is, and what it takes for one to be confirmed;
- `symbolic`: how a Python function is run on integers that stand for all integers;
- `crosshair`: whether CrossHair confirms the contract of a function;
- `shapes`: the pairs of rules that theorems on layouts run through;
- `mutations`: the wrong formulas that the theorems refute;
- `euclid`: the three facts about integers that this rests on;
- `ownership`, `lengths`, `balance`, `pages`, `windows`, `merge`: the theorems, by invariant;
- `engines`: engines' own closed forms, equal to a layout or told apart from it;
- `callers`: functions that call any placement that meets a contract;
- `contracts`: the contracts of the closed forms and of `callers`, as theorems;
- `catalog`: all theorems, held against `manifest.txt`, the theorems that there must be;
- `__main__`: the command above.

What is proved of what: the theorems of `ownership` to `windows` call `helix_spec.placement` itself,
on all paths, for all integers; those on layouts use theorems about the integer functions instead
of their bodies where it says `free` (so they hold for any functions that meet those theorems).
`merge` and `engines` restate formulas from outside. Inductions are by hand: base and step are
theorems, that they make the whole is said in words where it is used.

Nothing is imported here; z3 and CrossHair are needed for proofs alone.
"""
