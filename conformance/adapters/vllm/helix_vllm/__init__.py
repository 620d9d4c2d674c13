"""The code of vLLM 0.33.0 as engines of the conformance suite.

- `engines`: its block tables, its `KVCacheManager` and two of its merges, behind the protocol.

What the suite found in it is in FINDINGS.md, and `findings.toml` says what still shows it.
"""
