"""What a sharded decode KV cache costs on paper.

- `plans`: sizes of models and hardware, and the cost of one tp x cp split;
- `command`: `helix-conformance plan`, all splits as a table and as JSON.
"""
