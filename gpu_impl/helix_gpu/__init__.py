"""A sharded decode KV cache on torch.distributed: paged pool, ledger, attention, exchange, merge.

Helix parallelism (arXiv 2507.07120; TensorRT-LLM pull request 9757) spreads the KV cache of one
sequence over `cp_size` ranks. The modules, in reading order:

- `refusals`: why an event changes nothing;
- `dealing`: which tokens of a prompt each rank gets, and whose turn it is after it;
- `transfer`: what moves where when a prompt comes from ranks that split it otherwise;
- `sharing`: which pages several requests hold after a fork;
- `ledger`: the counters that all ranks keep alike, without communication;
- `allocator`, `block_tables`, `bookkeeping`: one rank's own pages and slots;
- `rope`, `attention`, `exchange`, `merge`: the arithmetic of one decode step;
- `push`, `hop_b`: an exchange by writing into the peers' memory; exchange and attention at a time;
- `cache`: the public face, `HelixCache`;
- `mesh`, `block`: ranks as TP x CP, and a transformer block whose FFN uses them as EP x TP.

Nothing is imported here: everything up to `bookkeeping` runs without torch.
"""
