"""The reference: what every rank must hold after every event, written to be read.

- `tokens`: lists of a request's tokens, a prompt of millions as ranges;
- `dealing`: which rank gets which token, by dealing pieces of the prompt;
- `state`: what all ranks of one sharded cache hold;
- `prefix`: what a request's first tokens may find in the cache;
- `refusals`: when an event is refused, and why;
- `model`: the state, changed by one event at a time;
- `groups`: several cache groups, a model of each;
- `attention`: exact attention in float64, and when two outputs are equal;
- `engine`: the model behind the engine protocol, as one more engine under test.

Pure Python, naive on purpose, no cleverness: speed is for `helix_gpu`.
"""
