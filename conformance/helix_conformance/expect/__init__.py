"""Test vectors: cases as JSON, for engines and test runners in any language.

- `format`: what a vector is, its JSON form and schema; `shipped/FORMAT.md` says it for people;
- `cases`: the traces, each with the reason why it is there;
- `making`: what the reference answers to them, as vectors; `python -m helix_conformance.expect`
  writes the shipped set anew;
- `checking`: vectors against an engine.

The set is generated and never edited. It lies in this package (`shipped/`), so that installed
copies have it too; `conformance/vectors` leads there.
"""
