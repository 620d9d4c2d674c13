"""Attention of new tokens over this rank's pages, and the exact merge of the ranks' partials.

- `rope`: rotary position embedding by global position;
- `paged`: partial attention on the CPU by torch;
- `native`: the same in C++, built at first use where there is a compiler;
- `backends`: the same by other libraries, where they are installed;
- `kernels`: the same, and the rest of a step, as Triton kernels;
- `partials`: the layout in which partials travel;
- `merge`: the attention over all keys, from partials over disjoint keys;
- `heads`: heads that do not divide over the ranks, padded.

Nothing is imported here.
"""
