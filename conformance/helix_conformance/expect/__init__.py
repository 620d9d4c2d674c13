"""What must be answered: expectations, from the reference or from a vector file.

- `arrays`: Q, K and V as arrays, the exact attention and its error bound;
- `expectation`: what every rank must answer to an event, and hold after it;
- `recorder`: plays the reference; the one module that imports it;
- `notation`, `cases`: the traces of which vectors are made, in words, each with its reason;
- `vectors`: a stored list of expectations, its JSON form and schema; `shipped/FORMAT.md` describes
  it for readers;
- `making`: what the recorder expects of the cases, as vectors; `python -m
  helix_conformance.expect` writes the shipped set anew.

The set is generated and never edited. It lies in this package (`shipped/`), so that installed
copies have it too; `conformance/vectors` leads there.
"""
