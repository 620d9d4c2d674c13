"""Models of `transformers` over a `HelixCache`: `ModelCache` is the cache that `generate` is given.

Nothing of a model is patched. Its attention is a function registered with `AttentionInterface`, its
mask one registered with `AttentionMaskInterface`, which hands on the padding; keys and values come
through `Cache.update`. Every rank runs the whole model, on the same tokens. Layers of full
attention are sharded; those with a window, and recurrent states, stay in the library's own cache
layers, whole on every rank.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, get_layer_types_and_kwargs
from transformers.masking_utils import causal_mask_function

from helix_gpu.attention.heads import PaddedHeads, padded_heads
from helix_gpu.cache import DecodeStep, HelixCache
from helix_spec.config import Config, LatentShape, ModelShape
from helix_spec.layouts import Layout, parse_layout

ATTENTION: Final = "helix"
"""The name under which the attention and the mask are registered."""
SHARDED: Final = "full_attention"
WINDOW: Final = "sliding_attention"
RECURRENT: Final = "linear_attention"
KINDS: Final = (SHARDED, WINDOW, RECURRENT)
Prompts = Literal["sharded", "admitted"]
"""How a prompt is computed: by the ranks together, or by each of them whole, to be admitted."""


def helix_config(
    model: PreTrainedModel,
    layout: Layout | str,
    *,
    pages: Sequence[int],
    max_len: int,
    tp_size: int = 1,
) -> Config:
    """Return the configuration of a cache for a model's layers of full attention.

    Heads that do not divide over the ranks are padded. The cache takes it with `rope=None`, since
    models rotate by themselves.

    Parameters
    ----------
    model : PreTrainedModel
    layout : Layout or str
    pages : sequence of int, [cp_size]
        As `pages_for` of `bookkeeping.sizing` counts them.
    max_len : int
        Tokens that a request may reach.
    tp_size : int

    Returns
    -------
    Config

    Raises
    ------
    ValueError
        For a model whose attention this is not.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=3, vocab_size=9)
    >>> model = LlamaForCausalLM(
    ...     LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **small)
    ... )
    >>> config = helix_config(model, "pr9757/1:C=1,T=4", pages=[4], max_len=16)
    >>> config.model.layers, config.model.q_heads, config.model.kv_heads, config.model.head_dim
    (3, 4, 2, 8)
    """
    layout = parse_layout(layout) if isinstance(layout, str) else layout
    text = model.config.get_text_config(decoder=True)
    kinds = _kinds(model)
    if SHARDED not in kinds:
        raise ValueError(f"{_name(model)} has no layer of full attention; there is none to shard.")
    heads = _heads(text, tp_size, layout.cp_size)
    latent, head_dim = None, getattr(text, "head_dim", None)
    if _has_latents(text):
        latent = LatentShape(latent_dim=text.kv_lora_rank, rope_dim=text.qk_rope_head_dim)
        head_dim = text.qk_nope_head_dim + text.qk_rope_head_dim
    dtype: Any = str(model.dtype).removeprefix("torch.")
    return Config(
        layout=layout,
        pages=list(pages),
        max_len=max_len,
        tp_size=tp_size,
        model=ModelShape(
            layers=kinds.count(SHARDED),
            q_heads=heads.q_heads,
            kv_heads=heads.kv_heads,
            head_dim=head_dim or text.hidden_size // text.num_attention_heads,
            latent=latent,
            dtype=dtype,
            product_dtype=dtype,  # as the library's own attention multiplies
        ),
    )


def own_attention(model: PreTrainedModel) -> str:
    """Return the library's own attention for a model, to take the one of this module back.

    Parameters
    ----------
    model : PreTrainedModel

    Returns
    -------
    str
        "sdpa", or "eager" for a model with sinks, which is all that there is on every device.
    """
    sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
    return "eager" if sinks else "sdpa"


@dataclass(slots=True)
class _Forward:
    """What one forward pass is about: new tokens of requests, which stand request after request."""

    ids: Sequence[int]
    firsts: Sequence[int]
    """Position of each request's first new token."""
    lens: Sequence[int]
    step: DecodeStep | None
    """None for whole prompts that are admitted when all layers have seen them."""
    real: Tensor | None = None
    """int64: which rows of the batch are tokens; None for all."""
    seen: int = -1
    """The last layer that has attended."""
    given: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    """K and V of the layers of full attention so far, of prompts to be admitted."""


class ModelCache(Cache):  # type: ignore[misc]
    """The cache of a model of `transformers`, of which this rank holds a share.

    `model.generate(..., **cache.argument)` and a forward pass use it as any other cache: a row of
    the batch is a request, tokens that the padding hides are nowhere, `crop` is `accept`, and
    `reorder_cache` forks and releases. One generation fills it; `reset` empties it.

    Or a loop of one's own begins steps of `helix`, `take`s each, and calls the model with the new
    tokens of all requests in one row, `position_ids` being those of the step. It then forks,
    preempts and releases by the methods here, which know of the windows too.

    Every rank makes the same calls. Assisted decoding is refused.

    Parameters
    ----------
    model : PreTrainedModel
        Its attention is set to the one of this module;
        `model.set_attn_implementation(own_attention(model))` takes it back.
    helix : HelixCache
        Of the configuration that `helix_config` gives, and with `rope=None`.
    prompts : {"sharded", "admitted"}
        Whether a prompt of `generate` is computed by the ranks together, or by each of them alone.

    Raises
    ------
    ValueError
        For a model whose attention this is not, and a cache of another shape.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=3, vocab_size=9)
    >>> model = LlamaForCausalLM(
    ...     LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **small)
    ... )
    >>> config = helix_config(model, "pr9757/1:C=1,T=4", pages=[4], max_len=16)
    >>> cache = ModelCache(model, HelixCache(config, rank=0, rope=None))
    >>> prompt = torch.tensor([[1, 2, 3, 4, 5]])
    >>> output = model.generate(
    ...     prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, min_new_tokens=4,
    ...     do_sample=False, pad_token_id=0, **cache.argument
    ... )
    >>> output.shape, cache.helix.local_len(0)  # the last token was not given to the model
    (torch.Size([1, 9]), 8)
    """

    def __init__(
        self, model: PreTrainedModel, helix: HelixCache, *, prompts: Prompts = "sharded"
    ) -> None:
        config = helix.config
        text = model.config.get_text_config(decoder=True)
        expected = helix_config(
            model, config.layout, pages=config.pages, max_len=config.max_len, tp_size=config.tp_size
        )
        if expected.model != config.model:
            raise ValueError(
                f"The cache is of {config.model}; {_name(model)} needs {expected.model}."
            )
        if helix.rotates:
            raise ValueError("The cache rotates Q and K, as the model does; give it rope=None.")
        if prompts not in ("sharded", "admitted"):
            raise ValueError(f"prompts is {prompts!r}; it must be 'sharded' or 'admitted'.")
        super().__init__(layers=DynamicCache(config=text).layers)
        self.helix = helix
        self._prompts = prompts
        self._heads = _heads(text, config.tp_size, config.layout.cp_size)
        self._kinds = _kinds(model)
        attending = [i for i, kind in enumerate(self._kinds) if kind != RECURRENT]
        self._first, self._last = attending[0], attending[-1]
        sharded = [i for i, kind in enumerate(self._kinds) if kind == SHARDED]
        self._place = {layer: place for place, layer in enumerate(sharded)}
        self._windows: dict[int, dict[int, Any]] = {
            i: {} for i, kind in enumerate(self._kinds) if kind == WINDOW
        }
        """By layer and request."""
        parameters = inspect.signature(model.forward).parameters
        self._argument = "cache" if "cache" in parameters else "past_key_values"
        self._rows: list[int] | None = None
        self._columns = 0
        self._forward: _Forward | None = None
        model.set_attn_implementation(ATTENTION)

    @property
    def argument(self) -> dict[str, ModelCache]:
        """Return this cache under the name that the installed version takes it by."""
        return {self._argument: self}

    @property
    def rows(self) -> list[int]:
        """Return the requests of the batch of `generate`, in its order."""
        return list(self._rows or ())

    def take(self, step: DecodeStep) -> None:
        """Let the next forward pass be this step's: its tokens come in one row, in their order.

        Parameters
        ----------
        step : DecodeStep
            As `begin` and `prefill` of `helix` return it; one of `reserve` where no layer has a
            window.

        Raises
        ------
        ValueError
            For a model with recurrent states, which `transformers` keeps by the rows of a batch.
        """
        self._check_no_states("Steps of several requests in a row")
        if step.tokens is None:
            if self._windows:
                raise ValueError("A reserved step names no requests, and layers have windows.")
            self._forward = _Forward((), (), (), step)
            return
        ids, firsts, ends = step.tokens.ids, step.tokens.firsts, step.tokens.ends
        self._forward = _Forward(ids, firsts.tolist(), (ends - firsts).tolist(), step)

    def take_prompts(self, ids: Sequence[int], prompt_lens: Sequence[int]) -> None:
        """Let the next forward pass be of whole prompts, which each rank computes and then admits.

        Parameters
        ----------
        ids : sequence of int, [n]
            New requests, and preempted ones, which are resumed with all their tokens.
        prompt_lens : sequence of int, [n]

        Raises
        ------
        Refused
            As `admit` and `resume` of `HelixCache`.
        ValueError
            As `take`, and for a preempted request that had another number of tokens.
        """
        self._check_no_states("Prompts of several requests in a row")
        book = self.helix.book
        again = [id for id in ids if id in book.preempted_ids]
        for id, tokens in zip(ids, prompt_lens, strict=True):
            if id in again and book.plan_resume(id).prompt_len != tokens:
                raise ValueError(
                    f"Request {id} is resumed with {tokens} tokens; it had "
                    f"{book.plan_resume(id).prompt_len} when it was preempted."
                )
        new = [(id, tokens) for id, tokens in zip(ids, prompt_lens, strict=True) if id not in again]
        if new:
            book.plan_admissions([id for id, _ in new], [tokens for _, tokens in new])
        self._forward = _Forward(list(ids), [0] * len(ids), list(prompt_lens), None)

    def fork(self, parent: int, child: int) -> None:
        """Begin a request as a copy of another, as `HelixCache.fork`.

        Parameters
        ----------
        parent, child : int
        """
        self._check_no_states("A fork")
        self._fork(parent, child)

    def preempt(self, id: int) -> None:
        """Free what a request holds, as `HelixCache.preempt`; all its tokens are computed again.

        Parameters
        ----------
        id : int
        """
        self.helix.preempt(id)
        self._forget(id)

    def release(self, id: int) -> None:
        """End a request, as `HelixCache.release`.

        Parameters
        ----------
        id : int
        """
        self.helix.release(id)
        self._forget(id)

    # What `transformers` calls.

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note which cache, and with latents which K, the attention that follows is of.

        Parameters
        ----------
        key_states, value_states : Tensor [batch, kv_heads, tokens, dim]
            With latents: the latent, and the part that is rotated.
        layer_idx : int
        *args, **kwargs
            Not looked at.

        Returns
        -------
        tuple of Tensor
            What was given: new tokens alone.
        """
        _now.cache = self, layer_idx, (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns of the batch so far, padding included.

        Parameters
        ----------
        layer_idx : int
            Not looked at.
        """
        return self._columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the columns of a mask, and the first one.

        Parameters
        ----------
        query_length : int
        layer_idx : int
            Not looked at.
        """
        return self._columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the tokens that a request may reach.

        Parameters
        ----------
        layer_idx : int, optional
            Not looked at.
        """
        return self.helix.config.max_len

    @property
    def is_croppable(self) -> bool:
        """Return False: what was a prompt is not taken back."""
        return False

    def activate_past_recording(self) -> None:
        """Refuse assisted decoding, which alone calls this."""
        raise ValueError(
            "Assisted decoding takes back tokens of prompts, which a HelixCache does not; generate "
            "without an assistant."
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of the last forward pass, which was no prompt's: `accept`.

        Parameters
        ----------
        tokens_to_remove : int
            Columns of the batch, as a number that is not positive.

        Raises
        ------
        ValueError
            For a positive number, and layers with windows or states, which are not taken back.
        Refused
            Where a request has no such tokens.
        """
        if tokens_to_remove > 0 or len(set(self._kinds)) > 1:
            raise ValueError(
                f"crop({tokens_to_remove}) of layers {', '.join(sorted(set(self._kinds)))}: the "
                "number may not be positive, and full attention alone takes tokens back."
            )
        if tokens_to_remove and self._forward is not None:
            for id, tokens in zip(self._forward.ids, self._forward.lens, strict=True):
                self.helix.accept(id, tokens + tokens_to_remove)
            self._columns += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row go on from another one, as beams do: forks and releases.

        Parameters
        ----------
        beam_idx : Tensor, int64 [rows]
        """
        before, after = self.rows, list[int]()
        for source in beam_idx.tolist():
            id = before[source]
            if id in after:
                id = self._fresh(1)[0]
                self._fork(before[source], id)
            after.append(id)
        for id in set(before) - set(after):
            self.release(id)
        self._rows = after
        for layer in self._recurrent():
            layer.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch.

        Parameters
        ----------
        indices : Tensor, int64 [rows]
        """
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let each row stand `repeats` times.

        Parameters
        ----------
        repeats : int
        """
        self.reorder_cache(torch.arange(len(self.rows)).repeat_interleave(repeats))

    def reset(self) -> None:
        """Release the requests of the batch."""
        for id in self.rows:
            self.release(id)
        self._rows, self._columns, self._forward = None, 0, None
        for layer in self._recurrent():
            layer.reset()

    def _attend(
        self, module: Any, layer: int, given: tuple[Tensor, Tensor],
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float,
    ) -> Tensor:  # fmt: skip
        """Attend with Q, K and V [batch, heads, columns, dim]: output [batch, columns, heads, dim].

        `given` is what `update` was given.
        """
        forward = self._forward
        if forward is None or layer <= forward.seen:
            forward = self._forward = self._begun(len(q), q.shape[2], mask)
        real, (batch, columns) = forward.real, (len(q), q.shape[2])

        def rows(x: Tensor) -> Tensor:
            x = x.transpose(1, 2).flatten(0, 1)
            return x if real is None else x[real]

        q, k, v = map(rows, (q, k, v))
        sinks = getattr(module, "sinks", None)
        if self._kinds[layer] == WINDOW:
            output = self._in_windows(forward, layer, q, k, v, scale, sinks)
        elif forward.step is None:
            forward.given.append(self._cached(k, v, *map(rows, given)))
            output = self._alone(forward, q, k, v, scale, sinks)
            if len(forward.given) == len(self._place):
                self._admit(forward)
        else:
            k, v_or_none = self._cached(k, v, *map(rows, given))
            output = self._sharded(
                forward.step, module, self._place[layer], q, k, v_or_none, scale, sinks
            )
        forward.seen = layer if layer != self._last else len(self._kinds)
        if real is not None:
            padded = output.new_zeros(batch * columns, *output.shape[1:])
            padded[real] = output
            output = padded
        return output.view(batch, columns, *output.shape[1:])

    def _begun(self, batch: int, columns: int, mask: Tensor | None) -> _Forward:
        """Begin a forward pass of `generate`: the rows of its batch are requests."""
        lens, real = [columns] * batch, None
        if mask is not None:
            if mask.shape != (batch, self._columns + columns):
                raise ValueError(
                    f"The mask has shape {tuple(mask.shape)}; it must say of {batch} rows and "
                    f"{self._columns + columns} columns which are padding."
                )
            new = mask[:, self._columns :].bool()
            before = mask[:, : self._columns].bool().sum(1)
            lens, held = torch.stack((new.sum(1), before)).tolist()
            cached = [self.helix.book.ledger.total(id) for id in self.rows] or [0] * batch
            if held != cached:
                raise ValueError(
                    f"The mask shows {held} earlier tokens of its rows; {cached} are cached, and "
                    "none of them can be hidden later."
                )
            if sum(lens) < batch * columns:
                real = new.flatten().nonzero()[:, 0]
        first = self._rows is None
        ids = self._fresh(batch) if self._rows is None else self._rows
        if len(ids) != batch:
            raise ValueError(f"The batch has {batch} rows; this cache was filled with {len(ids)}.")
        if first and min(lens) < 1:
            raise ValueError(f"The rows of the batch have {lens} tokens; each must have one.")
        firsts = [0] * batch if first else [self.helix.book.ledger.total(id) for id in ids]
        step = None
        if first and self._prompts == "sharded":
            (step,) = self.helix.prefill(ids, lens, sum(lens))
        elif not first:
            there = [(id, tokens) for id, tokens in zip(ids, lens, strict=True) if tokens]
            step = self.helix.begin([id for id, _ in there], [tokens for _, tokens in there])
        self._rows = list(ids)
        self._columns += columns
        return _Forward(list(ids), firsts, lens, step, real)

    def _sharded(
        self, step: DecodeStep, module: Any, place: int,
        q: Tensor, k: Tensor, v: Tensor | None, scale: float, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attend over all ranks' pages: [rows, heads, dim] of all heads, on every rank."""
        config = self.helix.config
        up_v = None
        if config.model.latent:
            up_k, up_v = _up_projections(module)
            q_pass, q_rot = torch.split(q, [up_k.shape[1], config.model.latent.rope_dim], -1)
            q = torch.cat((torch.einsum("mhd,hdl->mhl", q_pass, up_k), q_rot), -1)
        tp_rank = self.helix.rank // config.layout.cp_size
        q = self._heads.pad_q(q).chunk(config.tp_size, 1)[tp_rank]
        output, lse = self.helix.attend(step, place, q, k, v, scale=scale, return_lse=True)

        def mine(x: Tensor) -> Tensor:
            """Of what belongs to heads, what belongs to those that this rank has merged."""
            return self._heads.pad_q(x, 0).chunk(config.world_size)[self.helix.rank]

        if sinks is not None:
            output = (output * (lse - mine(sinks)).sigmoid()[..., None]).to(output.dtype)
        if up_v is not None:
            output = torch.einsum("mhl,hdl->mhd", output, mine(up_v))
        return self._heads.real(self.helix.gather(output))

    def _cached(
        self, k: Tensor, v: Tensor, latent: Tensor, rope: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """K and V [rows, kv_heads, dim] as this rank caches them."""
        config = self.helix.config
        if config.model.latent:
            return torch.cat((latent, rope), -1), None
        tp_rank = self.helix.rank // config.layout.cp_size
        k, v = (self._heads.pad_kv(x).chunk(config.tp_size, 1)[tp_rank] for x in (k, v))
        return k, v

    def _alone(
        self, forward: _Forward, q: Tensor, k: Tensor, v: Tensor, scale: float,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attend over each prompt, as if there were no other rank."""
        of_each = (torch.split(x, list(forward.lens)) for x in (q, k, v))
        return torch.cat(
            [_attend_here(q, k, v, None, scale, sinks) for q, k, v in zip(*of_each, strict=True)]
        )

    def _admit(self, forward: _Forward) -> None:
        """Hand over the prompts that all layers have seen."""
        ks, vs = zip(*forward.given, strict=True)
        k, v = torch.stack(ks), None if vs[0] is None else torch.stack(vs)
        begin = 0
        for id, tokens in zip(forward.ids, forward.lens, strict=True):
            part = slice(begin, begin + tokens)

            def prompt_kv(at: Tensor, part: slice = part) -> tuple[Tensor, Tensor | None]:
                return k[:, part][:, at], None if v is None else v[:, part][:, at]

            if id in self.helix.preempted_ids:
                self.helix.resume(id, prompt_kv, rotated=True)
            else:
                self.helix.admit(id, tokens, prompt_kv, rotated=True)
            begin += tokens

    def _in_windows(
        self, forward: _Forward, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attend over each request's window, which every rank holds."""
        held, outputs, begin = self._windows[layer], [], 0
        size: int = self.layers[layer].sliding_window
        for id, first, tokens in zip(forward.ids, forward.firsts, forward.lens, strict=True):
            if not tokens:
                continue
            part = slice(begin, begin + tokens)
            window = held.get(id)
            if first == 0:
                window = held[id] = DynamicSlidingWindowLayer(size)
            if window is None or window.get_seq_length() != first:
                raise ValueError(
                    f"The window of layer {layer} does not end before token {first} of request "
                    f"{id}; fork, preempt and release by the ModelCache."
                )
            new = (x[part].transpose(0, 1)[None] for x in (k, v))
            keys, values = (x[0].transpose(0, 1) for x in window.update(*new))
            outputs.append(_attend_here(q[part], keys, values, size, scale, sinks))
            begin += tokens
        return torch.cat(outputs)

    def _fork(self, parent: int, child: int) -> None:
        self.helix.fork(parent, child)
        for held in self._windows.values():
            if parent in held:
                copy = held[child] = DynamicSlidingWindowLayer(held[parent].sliding_window)
                vars(copy).update(vars(held[parent]))  # tensors are replaced, never written

    def _forget(self, id: int) -> None:
        for held in self._windows.values():
            held.pop(id, None)

    def _fresh(self, count: int) -> list[int]:
        """Return ids that no request has."""
        known = {*self.helix.request_ids, *self.helix.preempted_ids}
        return list(itertools.islice((id for id in itertools.count() if id not in known), count))

    def _recurrent(self) -> list[Any]:
        return [self.layers[i] for i, kind in enumerate(self._kinds) if kind == RECURRENT]

    def _check_no_states(self, what: str) -> None:
        if self._recurrent():
            raise ValueError(
                f"{what} needs states by request; transformers keeps recurrent states by the rows "
                "of a batch, so use `generate`."
            )


_now = threading.local()
"""The cache that `update` was last called of, here: the attention that follows is of it."""


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """What `AttentionInterface` calls for a layer."""
    cache, layer, given = vars(_now).pop("cache", (None, -1, ()))
    if cache is None or layer != module.layer_idx:
        raise ValueError(
            f"Layer {module.layer_idx} attends by {ATTENTION} without a ModelCache; pass one, as "
            "ModelCache.argument gives it, and leave use_cache on."
        )
    for name in ("softcap", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(f"Layer {layer} attends with a {name}, which a HelixCache does not.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return cache._attend(module, layer, given, query, key, value, attention_mask, scale), None


def _padding(
    *args: Any, mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None, local_size: int | None = None, use_vmap: bool = False,
    **options: Any,
) -> Tensor | None:  # fmt: skip
    """What `AttentionMaskInterface` calls: which columns are padding, [batch, columns]."""
    if use_vmap or (local_size is None and mask_function is not causal_mask_function):
        raise ValueError("The model's mask is not causal alone; a HelixCache attends causally.")
    return attention_mask


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _padding)


def _attend_here(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, sinks: Tensor | None
) -> Tensor:
    """Attend with the last tokens of a sequence, [n, heads, dim], over those that are here."""
    n, held = len(q), len(k)
    mask, plain = None, window is None and sinks is None and n == held
    if not plain:
        behind = torch.arange(held - n, held, device=q.device)[:, None]
        behind = behind - torch.arange(held, device=q.device)
        hidden = (behind < 0) | (behind >= (window or held))
        mask = q.new_zeros(n, held).masked_fill(hidden, -torch.inf)
    if sinks is not None and mask is not None:
        # A sink is one more key, of this logit and without a value.
        sink = sinks.to(q.dtype)[:, None, None].expand(-1, n, 1)
        mask = torch.cat((mask.expand(len(sinks), -1, -1), sink), -1)
        k, v = (torch.cat((x, x.new_zeros(1, *x.shape[1:]))) for x in (k, v))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    output = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=plain, scale=scale, enable_gqa=True
    )
    return output[0].transpose(0, 1)


def _up_projections(module: Any) -> tuple[Tensor, Tensor]:
    """From latents to K and V: [heads, dim, latent_dim] each."""
    weight: Tensor = module.kv_b_proj.weight
    dims = [module.qk_nope_head_dim, module.v_head_dim]
    up_k, up_v = torch.split(weight.view(-1, sum(dims), weight.shape[1]), dims, 1)
    return up_k, up_v


def _has_latents(text: Any) -> bool:
    return getattr(text, "kv_lora_rank", None) is not None


def _heads(text: Any, tp_size: int, cp_size: int) -> PaddedHeads:
    latent = _has_latents(text)
    kv_heads = 1 if latent else text.num_key_value_heads
    return padded_heads(text.num_attention_heads, kv_heads, tp_size, cp_size, latent=latent)


def _kinds(model: PreTrainedModel) -> list[str]:
    """Return what each layer keeps of its tokens; refuse a model whose attention this is not."""
    text = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or not getattr(text, "is_causal", True):
        raise ValueError(f"{_name(model)} is not a decoder whose tokens see those before them.")
    softcap = getattr(text, "attn_logit_softcapping", None)
    if softcap is not None:
        raise ValueError(
            f"{_name(model)} caps the logits of its attention at {softcap}; a HelixCache does not."
        )
    kinds: list[str] = list(get_layer_types_and_kwargs(text)[0])
    for layer, kind in enumerate(kinds):
        if kind not in KINDS:
            raise ValueError(
                f"Layer {layer} of {_name(model)} is of type {kind}; there are {', '.join(KINDS)}."
            )
    return kinds


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__
