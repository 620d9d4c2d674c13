"""A sharded decode KV cache on torch.distributed: paged pool, ledger, attention, exchange, merge.

Helix parallelism (arXiv 2507.07120; TensorRT-LLM pull request 9757) spreads the KV cache of one
sequence over `cp_size` ranks. Each layer below imports only those above it:

- `bookkeeping`: which rank holds which token, in which page, without tensors: `refusals`, `inputs`,
  `dealing`, `sharing`, `contents`, `ledger`, `allocator`, `block_tables`, `rank_book`,
  `group_book`, `written`, `sizing`;
- `transfer`: what moves where when a prompt comes from ranks that split it otherwise;
- `attention`: partial attention over a rank's own pages, and the merge: `rope`, `paged`, `native`,
  `backends` (`flashinfer`), `partials`, `merge`, `heads`, and `kernels` (`rope`, `append`,
  `decode`, `mla`, `narrow`, `results`, `reduce_pack`, `merge`, `step`, `settings`, `paging`,
  `common`);
- `comm`: ranks and how partials travel between them: `agreement`, `mesh`, `exchange`, `push`,
  `windows`, `push_kernels`, `hop_b`;
- `cache`: the public face, `HelixCache`;
- `group_cache`: `GroupCache`, the same for configurations with cache groups;
- `graphs`: steps captured once and replayed;
- `block`: a transformer block whose FFN uses the ranks as EP x TP;
- `models`: models of `transformers` over a `HelixCache`, for which that library must be there;
- `generate`: a command that generates text, and its loop of requests.

Nothing is imported here: `bookkeeping` and `transfer` run without torch.
"""
