"""Decode steps captured once and replayed, as CUDA graphs are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from helix_gpu.cache import HelixCache

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]
"""Takes the launches of some work down; what it returns does them again, on the same memory."""


def cuda_graph(work: Callable[[], None]) -> Replay:
    """Return the replay of a CUDA graph of what `work` launches.

    Every rank of the exchange captures alike.

    Parameters
    ----------
    work : callable
        Launches kernels and collectives.

    Returns
    -------
    Replay
    """
    # Before a capture kernels must be compiled and collectives connected, on another stream.
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call,unused-ignore]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Replay = graph.replay
    return replay


class StepGraph:
    """The decode step of all layers for a batch of a fixed number of rows.

    One for each batch size that is captured. The host writes where this step's tokens are into the
    buffers of `HelixCache.reserve(rows)`, and Q, K and V into those of the graph; then it replays.
    Every rank makes the same calls, with the same `rows`.

    Parameters
    ----------
    cache : HelixCache
        It attends with `triton`.
    rows : int
        New tokens and dummies together.
    capture : Capture
        What captures.

    Raises
    ------
    ValueError
        For another backend, whose work cannot be captured.
    """

    def __init__(self, cache: HelixCache, rows: int, capture: Capture = cuda_graph) -> None:
        if cache.backend != "triton":
            raise ValueError(f"The backend is {cache.backend}; only triton's steps are captured.")
        self.cache, self.rows = cache, rows
        model, step = cache.config.model, cache.reserve(rows)

        def zeros(heads: int, dim: int) -> Tensor:
            shape = (model.layers, rows, heads, dim)
            return torch.zeros(shape, dtype=cache.dtype, device=cache.device)

        self._q = zeros(cache.q_heads, model.key_dim)
        self._k = zeros(cache.kv_heads, model.key_dim)
        self._v = None if model.latent else zeros(cache.kv_heads, model.key_dim)
        self._output = zeros(model.q_heads // cache.config.world_size, model.value_dim)

        def work() -> None:
            for layer in range(model.layers):
                v = None if self._v is None else self._v[layer]
                attended = cache.attend(step, layer, self._q[layer], self._k[layer], v)
                self._output[layer].copy_(attended)

        self._replay = capture(work)

    @torch.no_grad()
    def decode(
        self,
        ids: Sequence[int],
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        query_lens: Sequence[int] | None = None,
    ) -> Tensor:
        """Do `HelixCache.decode` of m new tokens, at most `rows`; dummies are the rest.

        Parameters
        ----------
        ids : sequence of int, [n]
        q, k, v : Tensor [layers, m, heads, dim]
            As `HelixCache.decode` takes them, without dummies.
        query_lens : sequence of int, [n], optional
            New tokens of each request; one unless given.

        Returns
        -------
        Tensor [layers, m, heads, dim]
            Good until the next call.

        Raises
        ------
        Refused
            As `HelixCache.decode`.
        ValueError
            For too many tokens, or tensors of the wrong shape.
        """
        tokens = len(ids) if query_lens is None else sum(query_lens)
        inputs = self._inputs(tokens, q, k, v)
        step = self.cache.begin(ids, query_lens, pad=self.rows - tokens)
        output = self._replayed(tokens, inputs)
        self.cache.finish(step)
        return output

    @torch.no_grad()
    def replay(self, q: Tensor, k: Tensor, v: Tensor | None = None) -> Tensor:
        """Do all layers of the step that `HelixCache.begin` has begun last, of `rows` rows.

        Tell the cache so by `HelixCache.finish`.

        Parameters
        ----------
        q, k, v : Tensor
            As `decode` takes them; rows that are not given are dummies.

        Returns
        -------
        Tensor
            As `decode` returns it.

        Raises
        ------
        ValueError
            For too many tokens, or tensors of the wrong shape.
        """
        tokens = q.shape[1]
        return self._replayed(tokens, self._inputs(tokens, q, k, v))

    def _inputs(
        self, tokens: int, q: Tensor, k: Tensor, v: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """The graph's buffers, each with what is given for it. Raises ValueError if it misfits."""
        if tokens > self.rows:
            raise ValueError(f"The batch has {tokens} new tokens; this graph holds {self.rows}.")
        inputs = list[tuple[Tensor, Tensor]]()
        for buffer, given in ((self._q, q), (self._k, k), (self._v, v)):
            if buffer is None:
                continue
            want = (buffer.shape[0], tokens, *buffer.shape[2:])
            if given is None or tuple(given.shape) != want:
                shape = None if given is None else tuple(given.shape)
                raise ValueError(f"An input has shape {shape}; it must have {want}.")
            inputs.append((buffer, given))
        return inputs

    def _replayed(self, tokens: int, inputs: list[tuple[Tensor, Tensor]]) -> Tensor:
        for buffer, given in inputs:
            buffer[:, :tokens].copy_(given)
        self._replay()
        return self._output[:, :tokens]
