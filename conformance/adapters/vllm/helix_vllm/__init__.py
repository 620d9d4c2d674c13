"""The code of vLLM 0.33.0 as engines of the conformance suite, and what the suite found in it.

- `engines`: its block tables, its `KVCacheManager` and two of its merges, behind the protocol;
- `triton_on_cpu`: what Triton's interpreter lacks for its kernels;
- `findings`: whether what FINDINGS.md says still shows.
"""
