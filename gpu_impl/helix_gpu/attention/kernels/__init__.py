"""Triton kernels of one decode step, and what launches them.

In the order of a step:

- `rope` rotates Q and K;
- `append` stores the new K and V;
- `decode` (`mla` for latent caches, `narrow` for those of 8 bits) attends over each rank's own
  pages in splits;
- `reduce_pack` joins the splits and lays them into the send buffer, where there are several;
- `merge` joins what the ranks sent;
- `step` runs those from `append` on in order over persistent buffers;
- `settings` says how each is launched, `paging` how pages are read, `results` where
  results go, `common` what all of them use.

Nothing is imported here: these modules need triton, which the rest of `helix_gpu` does without.
Launching allocates nothing but the rotated rows, reads no device memory on the host and waits for
nothing, so that a step can be captured in a CUDA graph; contents of `tables`, `lengths` and `slots`
may change between replays, their shapes may not.
"""
