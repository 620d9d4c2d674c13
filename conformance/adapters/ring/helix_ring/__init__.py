"""Merges of ring attention as engines of the suite: torch's, and ring-attention-pytorch's.

Each stands in a module of its own, `torch_merger` and `tree_decode`, of which the second needs the
package ring-attention-pytorch.
"""
