"""`GroupCache`: one rank's share of a cache with groups, replicated ones and windows among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from helix_gpu.attention.merge import beside_sinks, merge
from helix_gpu.attention.partials import pack, unpack
from helix_gpu.bookkeeping.group_book import GroupAdmission, GroupBook, GroupChunk, GroupPlan
from helix_gpu.bookkeeping.ledger import Ints
from helix_gpu.bookkeeping.rank_book import RankBook
from helix_gpu.bookkeeping.refusals import StepError, check_config
from helix_gpu.bookkeeping.written import StepTokens
from helix_gpu.cache import DecodeStep, HelixCache, PromptKV, PromptSteps
from helix_spec.config import CacheGroup, Config

Partial = tuple[Tensor, Tensor]


class GroupCache(HelixCache):
    """The KV cache of one rank for a configuration with cache groups (SPEC.md section 4.2).

    It is used as `HelixCache` is, whose calls it takes, and takes K and V for each group by name:
    a mapping in place of a tensor, or of a function for prompts. Where a layer reads one group
    `attend` takes a tensor too. A layer's partials over sharded groups are exchanged and merged as
    ever, together; those over replicated groups, which every rank has, join the merge once, where
    the rank that is left with a head has it. A layer of replicated groups alone makes no exchange.

    Pages that leave a window go back when all layers have attended to the step, so a step may be
    cancelled until then. Groups of one pool with pages of the same number of tokens lie in the same
    memory, since a page belongs to one of them at a time.

    Parameters
    ----------
    config : Config
        With one cache group or more.
    **how
        As `HelixCache` takes it. Not yet: `hop_b`, and the backend `triton`.

    Raises
    ------
    Refused
        With `bad_config`.
    ValueError
        As `HelixCache`, without cache groups, and for what is not there yet.

    Examples
    --------
    >>> from helix_spec.config import ModelShape
    >>> groups = [CacheGroup(name="all", layers=[0]), CacheGroup(name="near", layers=[1], window=2)]
    >>> model = ModelShape(layers=2, q_heads=1, kv_heads=1, head_dim=4)
    >>> config = Config(layout="pr9757/1:C=1,T=1", pages=[9], max_len=9, model=model, groups=groups)
    >>> cache = GroupCache(config, rank=0)
    >>> def ones(at):
    ...     return torch.zeros(1, len(at), 1, 4), torch.ones(1, len(at), 1, 4)
    >>> cache.admit(7, 3, {"all": ones, "near": ones})
    >>> {name: member.block_table(7) for name, member in cache.members.items()}
    {'all': [0, 1, 2], 'near': [-1, -1, 5]}
    >>> k, v = torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1, 4), 5.0)
    >>> given = {"all": k, "near": k}, {"all": v, "near": v}
    >>> output = cache.decode([7], torch.zeros(2, 1, 1, 4), *given)
    >>> output.mean(-1).flatten().tolist()  # of values 1, 1, 1, 5, and of 1, 5
    [2.0, 3.0]
    """

    book: GroupBook  # type: ignore[assignment]

    def __init__(self, config: Config, **how: Any) -> None:
        check_config(config)
        if not config.groups:
            raise ValueError("The configuration has no cache groups; a HelixCache keeps it.")
        if how.get("hop_b") is not None:
            raise ValueError("Steps of cache groups do not attend in halves; hop_b must be None.")
        super().__init__(config, **how)
        if self.backend == "triton":
            raise ValueError("Cache groups have no backend triton yet; give torch or a function.")
        self.members: dict[str, HelixCache] = {}
        """By group, the cache of its layers alone, in the order of the configuration's groups."""
        self._readers: list[list[CacheGroup]] = [
            [group for group in config.groups if layer in group.layers]
            for layer in range(config.model.layers)
        ]
        self._add_members(how)

    def _add_members(self, how: Mapping[str, Any]) -> None:
        config, cp_rank = self.config, self.book.cp_rank
        keys = {
            group.name: (group.pool, config.layout_of(group).tokens_per_block)
            for group in config.groups
        }
        layers = dict.fromkeys(keys.values(), 0)
        for group in config.groups:
            layers[keys[group.name]] = max(layers[keys[group.name]], len(group.layers))
        memory = {
            (pool, t): self._new_pages(most, config.pool_sizes(pool)[cp_rank], t)
            for (pool, t), most in layers.items()
        }
        alike = {"device": self.device, "backend": self.backend}
        alike |= {name: how[name] for name in ("rope", "poison") if name in how}
        for group in config.groups:
            replicated = group.placement == "replicated"
            rank = how["rank"] // config.layout.cp_size if replicated else how["rank"]
            self.members[group.name] = _Member(
                config.alone(group, cp_rank),
                self.book.books[group.name],
                memory[keys[group.name]][: len(group.layers)],
                rank=rank,
                **alike,
            )
            self.members[group.name]._written = self._written

    def _new_book(self, cp_rank: int) -> RankBook:
        book: Any = GroupBook(self.config, cp_rank)
        return book  # type: ignore[no-any-return]

    def _new_pool(self) -> Tensor:
        return self._new_pages(0, 0, 1)  # members have the pages

    def close(self) -> None:
        """See `HelixCache.close`."""
        for member in self.members.values():
            member.close()
        super().close()

    def local_len(self, id: int) -> int:
        """Raise: each of `members` has a length of its own.

        Parameters
        ----------
        id : int

        Raises
        ------
        ValueError
        """
        raise ValueError("Each cache group has its own lengths; ask one of members.")

    def block_table(self, id: int) -> list[int]:
        """Raise: each of `members` has a block table of its own.

        Parameters
        ----------
        id : int

        Raises
        ------
        ValueError
        """
        raise ValueError("Each cache group has its own block tables; ask one of members.")

    def read(self, id: int, first: int, tokens: int) -> tuple[Tensor, Tensor | None]:
        """Raise: each of `members` has rows of its own, which it reads.

        Parameters
        ----------
        id, first, tokens : int

        Raises
        ------
        ValueError
        """
        raise ValueError("Each cache group has its own rows; ask one of members.")

    def cancel(self, step: DecodeStep) -> None:
        """Undo a step of `begin`; see `HelixCache.cancel`.

        Parameters
        ----------
        step : DecodeStep

        Raises
        ------
        StepError
            As `HelixCache.cancel`; with windows also once all layers have attended to it, for then
            pages have gone back.
        """
        tokens = self._tokens(step)
        self._written.check_step(tokens)
        if self.book.has_windows and len(self._written.whole(tokens.rows)):
            raise StepError(
                "All layers have attended to the step, and pages have left their windows; it "
                "cannot be undone."
            )
        super().cancel(step)

    def finish(self, step: DecodeStep) -> None:
        """Count a step as attended to by all layers; see `HelixCache.finish`.

        Parameters
        ----------
        step : DecodeStep

        Raises
        ------
        StepError
            As `HelixCache.finish`.
        """
        super().finish(step)
        self._end(self._tokens(step))

    def reserve(self, rows: int) -> DecodeStep:
        """Return a step of dummies, in whose buffers every later step of as many rows begins.

        Parameters
        ----------
        rows : int
            New tokens and dummies together.

        Returns
        -------
        DecodeStep

        Raises
        ------
        ValueError
            For less than one row.
        """
        steps = {name: member.reserve(rows) for name, member in self.members.items()}
        return self._reserved.setdefault(rows, self._grouped(steps))

    @torch.no_grad()
    def decode(
        self,
        ids: Sequence[int],
        q: Tensor,
        k: Any,
        v: Any = None,
        pad: int = 0,
        query_lens: Sequence[int] | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Do a whole step: `begin`, then `attend` for every layer.

        Parameters
        ----------
        ids : sequence of int, [n]
        q : Tensor [layers, m + pad, q_heads, head_dim]
        k, v : mapping of str to Tensor [layers, m + pad, kv_heads, head_dim]
            By group, of the layers that read it; no `v` where a latent is cached.
        pad : int
            Dummy requests behind the real ones.
        query_lens : sequence of int, [n], optional
            New tokens of each request; one unless given.
        sinks : Tensor, float32 [layers, q_heads], optional
            As `attend` takes them.

        Returns
        -------
        Tensor, the model's type [layers, m, q_heads / cp_size, head_dim]

        Raises
        ------
        Refused, StepError
            As `begin`.
        ValueError
            For tensors of the wrong shape or type; the step is then undone.
        """
        step, outputs = self.begin(ids, query_lens, pad), list[Tensor]()
        try:
            for layer, groups in enumerate(self._readers):
                places = {group.name: group.layers.index(layer) for group in groups}
                keys = {name: k[name][at] for name, at in places.items()}
                values = v and {name: v[name][at] for name, at in places.items()}
                of_layer = None if sinks is None else sinks[layer]
                output: Any = self.attend(step, layer, q[layer], keys, values, sinks=of_layer)
                outputs.append(output)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            self.cancel(step)
            raise ValueError(f"The step was undone: {error}") from error
        return torch.stack(outputs)

    @torch.no_grad()
    def attend(  # type: ignore[override]
        self,
        step: DecodeStep,
        layer: int,
        q: Tensor,
        k: Tensor | Mapping[str, Tensor],
        v: Tensor | Mapping[str, Tensor] | None = None,
        *,
        scale: float | None = None,
        return_lse: bool = False,
        sinks: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Do one layer of a step begun: append K and V, attend, exchange, merge.

        Parameters
        ----------
        step : DecodeStep
        layer : int
        q : Tensor
            As `HelixCache.attend` takes it.
        k : Tensor, or mapping of str to Tensor
            As `HelixCache.attend` takes it, for each group that the layer reads, by name.
        v : Tensor, or mapping of str to Tensor, optional
            As `k`.
        scale, return_lse, sinks
            As `HelixCache.attend` takes them.

        Returns
        -------
        output : Tensor
        lse : Tensor
            As `HelixCache.attend`.

        Raises
        ------
        StepError, ValueError
            As `HelixCache.attend`; for K or V of a group that is missing.
        """
        model, rows = self.config.model, len(step.lengths)
        with self._together("attend", layer, unless=step.tokens is None):
            layer = self._check_attend(step, layer)
            groups = self._readers[layer]
            self._check("Q", q, (rows, self.q_heads, model.key_dim))
            ks, vs = _by_name("K", k, groups), _by_name("V", v, groups)
            for group in groups:
                shape = (rows, self.kv_heads, model.key_dim)
                self._check_kv(ks[group.name], vs[group.name], shape, f"{group.name}'s ")
            slices = self._checked_sinks(sinks, (self.q_heads,))
        factor = model.softmax_scale if scale is None else float(scale)
        shared, own = list[Partial](), list[Partial]()
        for group in groups:
            member, place = self.members[group.name], group.layers.index(layer)
            here, pool = step.groups[group.name], member.pool[place]
            member._append(here, pool, ks[group.name], vs[group.name])
            rotated = member._rotated(here, q)
            found = member._attended(here, pool, rotated, layer, factor)
            (own if group.placement == "replicated" else shared).append(found)
        output, lse = self._merged(shared, own)
        for mine in slices:  # once, beside what all groups and ranks have
            output = beside_sinks(output, lse, mine)
        if step.tokens is not None:
            self._written.give(step.tokens, layer)
            self._end(step.tokens)
        output, lse = output[: step.outputs].to(self.dtype), lse[: step.outputs]
        return (output, lse) if return_lse else output

    def _merged(self, shared: Sequence[Partial], own: Sequence[Partial]) -> Partial:
        """One softmax of what all ranks have together and of what each of them has whole."""
        cp_size = self.book.layout.cp_size
        heads = self.q_heads // cp_size
        mine = slice(self.book.cp_rank * heads, (self.book.cp_rank + 1) * heads)
        parts = [(output[None, :, mine], lse[None, :, mine]) for output, lse in own]
        if shared and cp_size > 1:
            output, lse = _joined(shared)
            received = self._exchange(pack(output, lse, cp_size, self._wire))
            sent, lses = unpack(received, len(lse), heads, output.shape[-1], self._wire)
            parts.append((sent.float(), lses))
        else:
            parts += [(output[None], lse[None]) for output, lse in shared]
        outputs, lses = (torch.cat(some) for some in zip(*parts, strict=True))
        return merge(outputs, lses)

    def _end(self, tokens: StepTokens) -> None:
        """Give back what has left a window, of the requests whose steps are all attended to."""
        if self.book.has_windows:
            whole = self._written.whole(tokens.rows)
            if len(whole):
                self.book.drop(whole)

    def _grouped(self, steps: Mapping[str, DecodeStep]) -> DecodeStep:
        return replace(next(iter(steps.values())), groups=dict(steps))

    def _start(self, plan: Any) -> DecodeStep:
        of_groups: GroupPlan = plan
        members = self.members.items()
        return self._grouped(
            {name: one._start(its) for (name, one), its in zip(members, of_groups, strict=True)}
        )

    def _prompt(self, plan: Any, prompt_kv: Any, rotated: bool) -> Any:
        of_groups: GroupAdmission = plan
        if not isinstance(prompt_kv, Mapping) or prompt_kv.keys() != self.members.keys():
            raise ValueError(
                f"prompt_kv is {prompt_kv!r}; it must map each of {', '.join(self.members)} to a "
                "function of positions."
            )
        functions: Mapping[str, PromptKV] = prompt_kv
        return [
            member._prompt(its, functions[name], rotated)
            for (name, member), its in zip(self.members.items(), of_groups, strict=True)
        ]

    def _place(self, plan: Any, given: Any) -> None:
        for member, its, rows in zip(self.members.values(), plan, given, strict=True):
            member._place(its, rows)
        self.book.drop(self.book.ledger.rows([plan.id]))

    def _steps(self, plans: Any, chunk: int) -> PromptSteps:
        of_requests: Sequence[GroupAdmission] = plans
        for plan in of_requests:
            for member, its in zip(self.members.values(), plan, strict=True):
                member._clear(member.book.place(its))
            (row,) = self.book.ledger.rows([plan.id]).tolist()
            self._written.place(row, plan.prompt_len, given=False)
        return PromptSteps(self, plans, chunk)

    def _begun_chunk(self, chunk: Any, generations: Ints) -> DecodeStep:
        of_groups: GroupChunk = chunk
        tokens = StepTokens(
            self._written, chunk.ids, chunk.rows, chunk.firsts, chunk.ends, generations
        )
        self._written.check_step(tokens)
        self._check_reserved(len(chunk.step.rows))
        steps = {
            name: self.members[name]._begun(one.step) for name, one in of_groups.of_groups.items()
        }
        return replace(self._lodged(self._grouped(steps), tokens), of_prompt=True)


class _Member(HelixCache):
    """The cache of one group, whose book and memory are given; it exchanges nothing."""

    def __init__(self, config: Config, book: RankBook, pages: Tensor, **how: Any) -> None:
        self._given = book, pages
        super().__init__(config, exchange=_exchanges_nothing, **how)

    def _new_book(self, cp_rank: int) -> RankBook:
        return self._given[0]

    def _new_pool(self) -> Tensor:
        return self._given[1]


def _exchanges_nothing(send: Tensor) -> Tensor:
    raise RuntimeError("Partials of cache groups are exchanged together, not by one of them.")


def _joined(partials: Sequence[Partial]) -> Partial:
    """The partial over the rows of several groups; that of a single one is as it is."""
    if len(partials) == 1:
        return partials[0]
    outputs, lses = (torch.stack(some) for some in zip(*partials, strict=True))
    return merge(outputs, lses)


def _by_name(what: str, given: Any, groups: Sequence[CacheGroup]) -> dict[str, Any]:
    """What was given for each of these groups."""
    names = [group.name for group in groups]
    if given is None:
        return dict.fromkeys(names)
    if isinstance(given, Tensor) and len(names) == 1:
        return {names[0]: given}
    if not isinstance(given, Mapping) or set(given) != set(names):
        kind = sorted(given) if isinstance(given, Mapping) else f"a {type(given).__name__}"
        raise ValueError(f"{what} is given as {kind}; it must map each of {names} to a tensor.")
    return dict(given)
