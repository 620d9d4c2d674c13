"""Bookkeeping of a sharded cache, in NumPy alone: which rank holds which token, in which page.

- `refusals`: the exception of a refused event, and the check of a configuration;
- `inputs`: numbers as callers give them;
- `dealing`: the prompt shard of each rank, and the rank that owns the first decoded token;
- `sharing`: counts of the pages that several requests hold after a fork;
- `contents`: which pages hold which tokens, so that new requests find them;
- `ledger`: the counters that all ranks keep alike without communication;
- `allocator`: the free pages of one rank's pool;
- `block_tables`: the pages of each request on one rank;
- `rank_book`: `RankBook`, the ledger seen from one rank, with its pages and slots;
- `group_book`: `GroupBook`, one such book for each cache group, with the pools that they share;
- `written`: which tokens each layer was given, and which steps are still good;
- `sizing`: the pages that work takes which is known beforehand.

Nothing is imported here, and none of these modules needs torch.
"""
