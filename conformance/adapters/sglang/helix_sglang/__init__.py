"""The code of SGLang 0.5.23 as engines of the conformance suite, and what the suite found in it.

- `on_cpu`: its import on a machine without a GPU;
- `engines`: its paged allocator and KV pools, its Triton attention backend, and its merges.
"""
