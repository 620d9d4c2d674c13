"""What tests of `helix_gpu` share; the wheel does not hold it.

- `exact`: attention in float64, with the distance within which a result equals it;
- `roundings`: how far roundings may move a float64 result, by autograd;
- `pages`: K and V in shuffled pages of a pool;
- `ranks`: the ranks of a configuration as threads of one process;
- `block`: a transformer layer and its FFN, in float64 and on many ranks.
"""
