"""Text from a model whose KV cache is sharded: a command, and the loop behind it.

`torchrun --nproc-per-node=2 -m helix_gpu.generate --model FOLDER --cp 2 --prompt "Once upon"`
reads a folder of Hugging Face's format or a GGUF file, and prints what the model says. Every rank
runs the whole model and holds a share of the cache. `Loop` batches requests continuously: they join
and leave between steps, and those that find no pages wait.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, get_args

import click
import torch
import torch.distributed as dist
from torch import Tensor

from helix_gpu.bookkeeping.refusals import Refused
from helix_gpu.bookkeeping.sizing import pages_for
from helix_gpu.cache import DecodeStep, HelixCache
from helix_gpu.comm.mesh import helix_mesh
from helix_gpu.models import ModelCache, Prompts, helix_config, own_attention
from helix_spec.events import Reason
from helix_spec.layouts import NAMED_LAYOUTS, named_layout

Choose = Callable[[int, Tensor], int]
"""From a request and its logits [vocabulary] to its next token."""
DTYPES: Final = ("float32", "bfloat16", "float16")


@dataclass(slots=True)
class Request:
    """One request of a `Loop`."""

    tokens: list[int]
    """Its prompt, and what was chosen so far."""
    prompt_len: int
    new_tokens: int
    """How many are chosen for it, at most."""
    times: list[float] = field(default_factory=list)
    """When each was chosen, in seconds of `time.perf_counter`."""
    logits: list[Tensor] = field(default_factory=list)
    """float32 [vocabulary] on the CPU for each, where the loop keeps them."""

    @property
    def chosen(self) -> list[int]:
        """Return the tokens behind the prompt."""
        return self.tokens[self.prompt_len :]


class Loop:
    """Requests over a `ModelCache`, batched continuously.

    Each `step` computes a prompt that has come, if pages and batch allow it, or else one token of
    every live request. Where pages run out, the request that came last is preempted; it is
    computed again when another one has ended. Every rank makes the same calls; the tokens are those
    that rank 0 chooses.

    Parameters
    ----------
    model : PreTrainedModel
    cache : ModelCache
    choose : Choose, optional
        The most probable token, unless given.
    batch : int
        Requests that are live at a time, at most.
    chunk : int
        Tokens of a step of prompts, at most.
    prompts : {"sharded", "admitted"}
        Whether prompts are computed by the ranks together, or by each of them alone.
    stop : collection of int
        Tokens that end a request.
    group : ProcessGroup, optional
        All ranks, whose tokens are those of rank 0; none where there is one.
    keep_logits : bool
        Whether requests keep the logits of their tokens.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=3, vocab_size=9)
    >>> model = LlamaForCausalLM(
    ...     LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **small)
    ... )
    >>> config = helix_config(model, "pr9757/1:C=1,T=4", pages=[8], max_len=16)
    >>> loop = Loop(model, ModelCache(model, HelixCache(config, rank=0, rope=None)))
    >>> for prompt in ([1, 2, 3], [4, 5, 6, 7, 8]):
    ...     id = loop.add(prompt, new_tokens=4)
    >>> [len(request.chosen) for request in loop.run()]
    [4, 4]
    """

    def __init__(
        self,
        model: Any,
        cache: ModelCache,
        choose: Choose | None = None,
        *,
        batch: int = 8,
        chunk: int = 512,
        prompts: Prompts = "sharded",
        stop: Sequence[int] = (),
        group: dist.ProcessGroup | None = None,
        keep_logits: bool = False,
    ) -> None:
        self.model, self.cache = model, cache
        self.requests: list[Request] = []
        self.live: list[int] = []
        self.waiting: list[int] = []
        """In the order in which they are placed; preempted ones first."""
        self.peak_pages = 0
        """Pages of this rank's pool that were held at a time, at most."""
        self._choose = choose or (lambda id, logits: int(logits.argmax()))
        self._batch, self._chunk, self._prompts = batch, chunk, prompts
        self._stop, self._group, self._keep_logits = frozenset(stop), group, keep_logits
        self._kept: list[int] = []
        self._full = False
        """Whether pages ran out since a request last ended."""

    def add(self, prompt: Sequence[int], new_tokens: int) -> int:
        """Let a request wait for its turn, and return its id.

        Parameters
        ----------
        prompt : sequence of int
        new_tokens : int
            How many tokens are chosen for it, at most.

        Raises
        ------
        ValueError
            For a prompt or a number that is none, and more tokens than the cache allows.
        """
        longest = self.cache.helix.config.max_len
        if not prompt or new_tokens < 1 or len(prompt) + new_tokens > longest:
            raise ValueError(
                f"The prompt has {len(prompt)} tokens, and {new_tokens} are to be chosen; each "
                f"must be at least 1, and both together at most {longest}."
            )
        self.requests.append(Request(list(prompt), len(prompt), new_tokens))
        self.waiting.append(len(self.requests) - 1)
        return len(self.requests) - 1

    def keep(self, prefix: Sequence[int]) -> int:
        """Compute tokens with which prompts begin, once, and keep them; return the id.

        Prompts that are placed later and go on from them share their pages.

        Parameters
        ----------
        prefix : sequence of int

        Raises
        ------
        Refused
            Where the pools do not suffice.
        """
        id = len(self.requests)
        self.requests.append(Request(list(prefix), len(prefix), 0))
        with torch.no_grad():
            for step in self.cache.helix.prefill(id, len(prefix), self._chunk):
                self._forward(step)
        self._kept.append(id)
        return id

    def fork(self, id: int) -> int:
        """Begin a live request as a copy of another one, and return its id.

        Parameters
        ----------
        id : int
        """
        child, parent = len(self.requests), self.requests[id]
        self.cache.fork(id, child)
        self.requests.append(
            replace(
                parent, tokens=list(parent.tokens), times=list(parent.times),
                logits=list(parent.logits),
            )
        )  # fmt: skip
        self.live.append(child)
        return child

    def preempt(self, id: int) -> None:
        """Take a live request's pages; it is computed again before others are placed.

        Parameters
        ----------
        id : int
        """
        self.cache.preempt(id)
        self.live.remove(id)
        self.waiting.insert(0, id)

    def run(self) -> list[Request]:
        """Step until every request has ended, and return all of them."""
        while self.live or self.waiting:
            self.step()
        return self.requests

    @torch.no_grad()
    def step(self) -> list[int]:
        """Compute a prompt, or a token of every live request; return who was given a token.

        Raises
        ------
        Refused
            Where the pools do not suffice for a single request.
        """
        steps = self._placed()
        if steps is None:
            return self._forward(self._decode_step())
        return [id for step in steps for id in self._forward(step)]

    def _placed(self) -> Iterator[DecodeStep | tuple[int, int]] | None:
        """Place the first that waits, and return the steps that compute it; None if it waits on."""
        if self._full or not self.waiting or len(self.live) >= self._batch:
            return None
        try:
            steps = self._steps_of(self.waiting[0])
        except Refused as error:
            if error.reason is not Reason.OUT_OF_PAGES or not self.live:
                raise
            self._full = True
            return None
        self.live.append(self.waiting.pop(0))
        return steps

    def _steps_of(self, id: int) -> Iterator[DecodeStep | tuple[int, int]]:
        """Take pages for a request's tokens, and return the steps that compute them."""
        helix, tokens = self.cache.helix, self.requests[id].tokens
        again = id in helix.preempted_ids
        if self._prompts == "admitted":
            # The last token of a preempted request was chosen, and not yet given to the model.
            held = helix.book.plan_resume(id).prompt_len if again else len(tokens)
            self.cache.take_prompts([id], [held])
            return iter([(id, held)])
        if again:
            return helix.recompute(id, self._chunk)
        kept = [(self.requests[kept].tokens, kept) for kept in self._kept]
        fitting = [x for x in kept if len(x[0]) < len(tokens) and tokens[: len(x[0])] == x[0]]
        if not fitting:
            return helix.prefill(id, len(tokens), self._chunk)
        prefix, parent = max(fitting, key=lambda x: len(x[0]))
        self.cache.fork(parent, id)
        try:
            helix.skip([id], [len(tokens) - len(prefix)])
        except Refused:
            self.cache.release(id)
            raise
        ends = range(len(prefix), len(tokens), self._chunk)
        return (helix.begin([id], [min(self._chunk, len(tokens) - first)]) for first in ends)

    def _decode_step(self) -> DecodeStep:
        """Begin a token of every live request, of fewer where pages run out."""
        while True:
            try:
                return self.cache.helix.begin(self.live)
            except Refused as error:
                if error.reason is not Reason.OUT_OF_PAGES or len(self.live) == 1:
                    raise
            self.preempt(self.live[-1])
            self._full = True

    def _forward(self, step: DecodeStep | tuple[int, int]) -> list[int]:
        """Run the model, and choose the next token of requests whose tokens it has all seen.

        On a step, or on a request and as many tokens as are admitted at once.
        """
        if isinstance(step, tuple):
            ids, firsts, ends = [step[0]], [0], [step[1]]
        else:
            assert step.tokens is not None
            ids, firsts = list(step.tokens.ids), step.tokens.firsts.tolist()
            ends = step.tokens.ends.tolist()
            self.cache.take(step)
        pieces = list(zip(ids, firsts, ends, strict=True))
        tokens = [x for id, first, end in pieces for x in self.requests[id].tokens[first:end]]
        positions = [x for _, first, end in pieces for x in range(first, end)]
        behind = itertools.accumulate(end - first for _, first, end in pieces)
        ready = {
            id: row - 1
            for (id, _, end), row in zip(pieces, behind, strict=True)
            if end == len(self.requests[id].tokens) and self.requests[id].new_tokens
        }
        device = self.cache.helix.device
        given, at = torch.tensor([tokens, positions], device=device)
        logits = self.model(
            given[None], position_ids=at[None], use_cache=True, **self.cache.argument,
            logits_to_keep=torch.tensor([*ready.values()] or [0], device=device),
        ).logits[0, : len(ready)]  # fmt: skip
        held = len(self.cache.helix.pool[0]) - self.cache.helix.free_pages
        self.peak_pages = max(self.peak_pages, held)
        self._give([*ready], logits)
        return [*ready]

    def _give(self, ids: list[int], logits: Tensor) -> None:
        """Choose the next token of each, and end those that have all."""
        chosen = torch.tensor(
            [self._choose(id, row) for id, row in zip(ids, logits, strict=True)],
            dtype=torch.int64, device=self.cache.helix.device,
        )  # fmt: skip
        if self._group is not None and ids:
            dist.broadcast(chosen, group_src=0, group=self._group)
        now = time.perf_counter()
        for id, token, row in zip(ids, chosen.tolist(), logits, strict=True):
            request = self.requests[id]
            request.tokens.append(token)
            request.times.append(now)
            if self._keep_logits:
                request.logits.append(row.float().cpu())
            if len(request.chosen) == request.new_tokens or token in self._stop:
                self.cache.release(id)
                self.live.remove(id)
                self._full = False


def sampler(temperature: float, seed: int) -> Choose:
    """Return what chooses a token: the most probable, or one drawn by its probability.

    A request's tokens do not depend on what is batched with it.

    Parameters
    ----------
    temperature : float
        0 for the most probable.
    seed : int

    Examples
    --------
    >>> choose = sampler(temperature=1.0, seed=3)
    >>> [choose(0, torch.zeros(10)) for _ in range(4)] == [choose(0, torch.zeros(10))] * 4
    False
    >>> sampler(0.0, 3)(0, torch.tensor([1.0, 3.0, 2.0]))
    1
    """
    generators: dict[int, torch.Generator] = {}

    def choose(id: int, logits: Tensor) -> int:
        if temperature == 0:
            return int(logits.argmax())
        if id not in generators:
            generators[id] = torch.Generator().manual_seed(seed + id)
        weights = (logits.float().cpu() / temperature).softmax(-1)
        return int(torch.multinomial(weights, 1, generator=generators[id]))

    return choose


def load(path: Path, dtype: str | None, device: torch.device) -> tuple[Any, Any]:
    """Return a model and its tokenizer, None where the folder has none; nothing is downloaded.

    Parameters
    ----------
    path : Path
        A folder of Hugging Face's format, or a GGUF file.
    dtype : str, optional
        As it is stored unless given.
    device : torch.device
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = path
    given: dict[str, Any] = {"local_files_only": True}
    if path.is_file():
        folder, given["gguf_file"] = path.parent, path.name
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype) if dtype else "auto", **given
    )
    tokenizer = None
    if path.is_file() or any(folder.glob("tokenizer*")):
        tokenizer = AutoTokenizer.from_pretrained(folder, **given)
    return model.eval().to(device), tokenizer


class Printer:
    """Prints what is chosen, on rank 0: a single request as it comes, others as they end."""

    def __init__(self, loop: Loop, tokenizer: Any) -> None:
        self._loop, self._tokenizer = loop, tokenizer
        self._printed = [""] * len(loop.requests)

    def text(self, id: int) -> str:
        """Return what was chosen for a request, as text or as numbers.

        Parameters
        ----------
        id : int
        """
        chosen = self._loop.requests[id].chosen
        if self._tokenizer is None:
            return " ".join(map(str, chosen))
        text: str = self._tokenizer.decode(chosen, skip_special_tokens=True)
        return text

    def show(self, ids: Sequence[int]) -> None:
        """Print what is new of requests that were given a token.

        Parameters
        ----------
        ids : sequence of int
        """
        for id in ids:
            ended, text = id not in self._loop.live, self.text(id)
            if len(self._printed) > 1:
                if ended:
                    print(f"[{id}] {text}", flush=True)
                continue
            # The last bytes of a character may be missing yet.
            if ended or not text.endswith("\ufffd"):
                print(text[len(self._printed[0]) :], end="\n" if ended else "", flush=True)
                self._printed[0] = text


@torch.no_grad()
def compare(model: Any, requests: Sequence[Request]) -> list[str]:
    """Return, for each request, where the model without a sharded cache would choose otherwise.

    It is given the same tokens, all at once, and attends by the library's own attention from then
    on.

    Parameters
    ----------
    model : PreTrainedModel
    requests : sequence of Request
        With their logits.
    """
    model.set_attn_implementation(own_attention(model))
    said = []
    for id, request in enumerate(requests):
        tokens = torch.tensor([request.tokens[:-1]], device=model.device)
        kept = len(request.chosen)
        own = model(tokens, use_cache=False, logits_to_keep=kept).logits[0].float().cpu()
        sharded = torch.stack(request.logits)
        differs = (own.argmax(-1) != sharded.argmax(-1)).nonzero()[:, 0].tolist()
        first = "the most probable token is the same at each"
        if differs:
            best = own[differs[0]].topk(2).values
            first = (
                f"the most probable token differs at {len(differs)}, first at step {differs[0]}, "
                f"where the best two are {float(best[0] - best[1]):.3g} apart"
            )
        distance = float((own - sharded).abs().max())
        said.append(
            f"[{id}] {kept} steps: {first}; logits are up to {distance:.3g} apart, and up to "
            f"{float(own.abs().max()):.3g} large."
        )
    return said


def report(loop: Loop, began: float) -> list[str]:
    """Return what the run took, the same on all ranks, each of which calls it.

    Parameters
    ----------
    loop : Loop
    began : float
        When the requests came, in seconds of `time.perf_counter`.
    """
    helix, requests = loop.cache.helix, loop.requests
    times = [x for request in requests for x in request.times]
    seconds = max(times) - began
    first = [request.times[0] - began for request in requests]
    pages = torch.tensor([loop.peak_pages], device=helix.device)
    held = [pages]
    if helix.config.world_size > 1:
        held = [torch.empty_like(pages) for _ in range(helix.config.world_size)]
        dist.all_gather(held, pages)
    page = helix.pool[:, 0].nbytes
    return [
        f"{helix.config.world_size} ranks (tp {helix.config.tp_size}), {helix.config.layout}: "
        f"{len(times):,} tokens in {seconds:.2f} s, {len(times) / seconds:.1f} a second, behind "
        f"{sum(request.prompt_len for request in requests):,} of prompts.",
        f"Time to the first token: {min(first):.2f} to {max(first):.2f} s.",
        f"KV bytes held at a time, by rank: {', '.join(f'{int(x) * page:,}' for x in held)}.",
    ]


@click.command(help="Generate text with a KV cache that is sharded over the ranks of torchrun.")
@click.option("--model", "path", type=click.Path(exists=True, path_type=Path), required=True,
              help="A folder of Hugging Face's format, or a GGUF file.")  # fmt: skip
@click.option("--prompt", "prompts", multiple=True, help="Text; give several to batch them.")
@click.option("--prompt-file", "files", multiple=True, type=click.Path(exists=True, path_type=Path),
              help="A file of a prompt's text.")  # fmt: skip
@click.option("--prompt-ids", "ids", multiple=True, help="A prompt as numbers: 1,2,3.")
@click.option("--tp", default=1, show_default=True, help="Tensor-parallel ranks of the attention.")
@click.option("--cp", default=None, type=int, help="Ranks that share a sequence [default: all].")
@click.option("--layout", default="pr9757", show_default=True, type=click.Choice([*NAMED_LAYOUTS]))
@click.option("--page", default=16, show_default=True, help="Tokens in a page.")
@click.option("--pages", default=None, type=int, help="Pages of each rank [default: enough].")
@click.option("--new-tokens", default=64, show_default=True, help="Tokens to generate, at most.")
@click.option("--batch", default=8, show_default=True, help="Requests at a time, at most.")
@click.option("--chunk", default=512, show_default=True, help="Tokens of a prompt at a time.")
@click.option("--prompt-by", default="sharded", show_default=True,
              type=click.Choice(get_args(Prompts)),
              help="Whether the ranks compute prompts together, or each alone.")  # fmt: skip
@click.option("--dtype", default=None, type=click.Choice(DTYPES), help="[default: as stored]")
@click.option("--temperature", default=0.0, show_default=True, help="0 for the most probable.")
@click.option("--seed", default=0, show_default=True)
@click.option("--ignore-end", is_flag=True, help="Generate on behind the end of the text.")
@click.option("--compare", "compared", is_flag=True, help="Run the model unsharded beside it.")
def _main(
    path: Path, prompts: Sequence[str], files: Sequence[Path], ids: Sequence[str], tp: int,
    cp: int | None, layout: str, page: int, pages: int | None, new_tokens: int, batch: int,
    chunk: int, prompt_by: Prompts, dtype: str | None, temperature: float, seed: int,
    ignore_end: bool, compared: bool,
) -> None:  # fmt: skip
    """Read a model, generate, and say what it took."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if tp < 1 or ranks % tp or (cp is not None and cp * tp != ranks):
        raise click.UsageError(
            f"--tp {tp} and --cp {cp or 'all'} do not make the {ranks} ranks that run; torchrun "
            "--nproc-per-node says how many do."
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if rank:
        from transformers.utils import logging

        logging.disable_progress_bar()
    began = time.perf_counter()
    model, tokenizer = load(path, dtype, device)
    if not rank:
        seconds = time.perf_counter() - began
        print(f"{path.name} is read in {seconds:.1f} s.", file=sys.stderr, flush=True)
    texts = [*prompts, *(file.read_text() for file in files)]
    if texts and tokenizer is None:
        raise click.UsageError(f"{path} has no tokenizer; give --prompt-ids.")
    given = [tokenizer(text)["input_ids"] for text in texts]
    given += [[int(x) for x in text.split(",")] for text in ids]
    if not given:
        raise click.UsageError("There is no prompt; give --prompt, --prompt-file or --prompt-ids.")
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    lens = [len(prompt) for prompt in given]
    rule = named_layout(layout, cp_size=ranks // tp, tokens_per_block=page)
    enough = pages_for(rule, lens, new_tokens, min(batch, len(given)))
    config = helix_config(
        model, rule, pages=[pages] * rule.cp_size if pages else enough,
        max_len=max(lens) + new_tokens, tp_size=tp,
    )  # fmt: skip
    if ranks > 1:
        made = HelixCache.on(config, helix_mesh(config, device.type), rope=None)
    else:
        made = HelixCache(config, rank=0, device=device, rope=None)
    ends = model.generation_config.eos_token_id
    stop = [] if ignore_end or ends is None else [ends] if isinstance(ends, int) else ends
    with made as helix:
        loop = Loop(
            model, ModelCache(model, helix), sampler(temperature, seed), batch=batch, chunk=chunk,
            prompts=prompt_by, stop=stop, group=dist.group.WORLD if ranks > 1 else None,
            keep_logits=compared,
        )  # fmt: skip
        for prompt in given:
            loop.add(prompt, new_tokens)
        printer, began = Printer(loop, tokenizer), time.perf_counter()
        while loop.live or loop.waiting:
            ready = loop.step()
            if not rank:
                printer.show(ready)
        said = report(loop, began)
    if not rank:
        said += compare(model, loop.requests) if compared else []
        print(*said, sep="\n", file=sys.stderr, flush=True)
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    _main()
