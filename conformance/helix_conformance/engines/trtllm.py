"""TensorRT-LLM's own Python rules of placement, out of a source checkout that is not built.

`--engine trtllm:PATH` reads the functions that place tokens from the user's checkout, by their
syntax trees: the package is never imported. They are run as they stand, with small stand-ins for
what is compiled (`impl.add_token` counts). What is found decides the layout:

| rule | where | found as |
|---|---|---|
| prompt | `partition_context_for_helix` in `request_utils.py`, or the older | contiguous or |
| | `_merge_helix_requests` in `executor_request_queue.py` | round_robin |
| owner | the loop of `prepare_resources` in `resource_manager.py` | step or last_rank |
| positions, past lengths | `model_engine.py`, where `total_input_len_cp` is read | |

A checkout in which one of them is missing, or does something else, is refused before any work; so
is one whose rules are those of `KVCacheManagerV2`, which are not read.
Pages are taken by compiled code, so the layout is the `lazy` one and `pages` is not declared; the
slots are this module's own, of the local index that the counts give.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Final

from helix_spec.configs import Config, config_problem
from helix_spec.events import Admit, Decode, Event, Outcome, RankView, Reason, Release, Skip

FOLDER: Final = Path("tensorrt_llm/_torch/pyexecutor")
PARTITION: Final = "partition_context_for_helix"
OLDER_PARTITION: Final = "_merge_helix_requests"
LAYOUTS: Final = {
    ("contiguous", "last_rank"): "before_9757",
    ("contiguous", "step"): "pr9757",
    ("round_robin", "step"): "pr13180",
}
"""The layout of each prompt split and owner rule that can be found."""
APART: Final = 10**6
"""Pages kept for each request: this engine allocates none."""

Partition = Callable[[list[int], int, int, int], tuple[list[int], list[int], int, int]]


class SourceError(ValueError):
    """A checkout whose rules are not there or not known; the message names file and function."""


class Sources:
    """The rules that place tokens in one checkout.

    Raises SourceError, in a sentence, for a checkout in which they are not recognised.
    """

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.partition = self._partition()
        self.gate = self._gate()
        self.positions = self._positions()
        self.split, self.owner = self._split(), self._owner()
        self._check_positions()
        if (self.split, self.owner) not in LAYOUTS:
            raise SourceError(f"No layout has {self.split} prompts and {self.owner} owners.")
        self.layout = LAYOUTS[self.split, self.owner]

    def _tree(self, name: str, *, missing_is_fine: bool = False) -> ast.Module:
        path = self.checkout / FOLDER / name
        if missing_is_fine and not path.exists():
            return ast.Module([], [])
        try:
            return ast.parse(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SourceError(
                f"{path} cannot be read ({error.strerror}); PATH must be a TensorRT-LLM checkout."
            ) from error
        except (SyntaxError, ValueError) as error:
            raise SourceError(f"{path} is not Python: {error}.") from error

    def _partition(self) -> Partition:
        """The function that deals a prompt."""
        import torch

        for node in self._tree("request_utils.py", missing_is_fine=True).body:
            if isinstance(node, ast.FunctionDef) and node.name == PARTITION:
                self.prompt_rule = f"{PARTITION} in request_utils.py"
                partition: Partition = _compiled(node, {"torch": torch})
                return partition
        older = "executor_request_queue.py"
        for method in ast.walk(self._tree(older, missing_is_fine=True)):
            if isinstance(method, ast.FunctionDef) and method.name == OLDER_PARTITION:
                self.prompt_rule = f"{OLDER_PARTITION} in {older}"
                made = {"executor_request_to_llm_request": _llm_request, "torch": torch}
                return _as_partition(_compiled(method, made))
        raise SourceError(
            f"{self.checkout / FOLDER} has neither {PARTITION} in request_utils.py nor "
            f"{OLDER_PARTITION} in {older}; PATH must be a checkout of TensorRT-LLM with Helix."
        )

    def _gate(self) -> Callable[[Any, list[Any]], None]:
        """The loop over generation requests that says which rank is active."""
        for loop in _loops(self._tree("resource_manager.py"), "prepare_resources"):
            if "py_helix_is_inactive_rank" in _names(loop):
                loop.iter = ast.Name("requests", ast.Load())
                gate: Callable[[Any, list[Any]], None] = _function(
                    "gate", ["self", "requests"], [loop], {"get_draft_token_length": lambda _: 0}
                )
                return gate
        raise SourceError(
            f"{self.checkout / FOLDER / 'resource_manager.py'} has no loop in prepare_resources "
            "that sets py_helix_is_inactive_rank; an owner rule kept elsewhere is not known."
        )

    def _positions(self) -> Callable[[Any], tuple[int, int]]:
        """The arithmetic of positions and past lengths."""
        for node in ast.walk(self._tree("model_engine.py")):
            if isinstance(node, ast.If) and "has_cp_helix" in ast.dump(node.test):
                names = _names(node)
                if {"total_input_len_cp", "py_decoding_iter", "seqlen_this_rank_cp"} <= names:
                    return _arithmetic(node)
        raise SourceError(
            f"{self.checkout / FOLDER / 'model_engine.py'} does not compute positions from "
            "total_input_len_cp and py_decoding_iter under has_cp_helix; its rule is not known."
        )

    def _split(self) -> str:
        """Which of the splits the prompt's rule is, by what it does with three blocks of two."""
        found = [self._dealt(range(6), rank, 2, 2) for rank in range(2)]
        known = {
            "contiguous": [[0, 1, 2, 3], [4, 5]],
            "round_robin": [[0, 1, 4, 5], [2, 3]],
        }
        for split, right in known.items():
            if found == right:
                return split
        raise SourceError(
            f"{self.prompt_rule} deals six tokens in blocks of 2 to 2 ranks as {found}; that is "
            "neither contiguous nor round-robin."
        )

    def _owner(self) -> str:
        """Which of the owner rules it is: two ranks, pages of 2, the first five steps."""
        found = []
        for rank in range(2):
            steps = []
            for step in range(5):
                request = _request(0, 0)
                request.py_decoding_iter = step + 1
                self.gate(_manager(rank, 2, 2), [request])
                steps.append(int(not request.py_helix_is_inactive_rank))
            found.append(steps)
        known = {
            "step": [[1, 1, 0, 0, 1], [0, 0, 1, 1, 0]],
            "last_rank": [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
        }
        for owner, right in known.items():
            if found == right:
                return owner
        raise SourceError(
            f"prepare_resources makes ranks 0 and 1 active, with pages of 2, in steps {found}; "
            "that is neither the step rule nor the last rank."
        )

    def _check_positions(self) -> None:
        """Position and past length of the second step of a request, active and not."""
        found = []
        for inactive in (False, True):
            request = _request(5, 3)
            request.py_decoding_iter, request.py_helix_is_inactive_rank = 2, inactive
            try:
                found.append(self.positions(request))
            except (NameError, AttributeError) as error:
                raise SourceError(
                    f"model_engine.py reads something else for its positions: {error}."
                ) from error
        if found != [(6, 2), (6, 3)]:
            raise SourceError(
                "model_engine.py gives position and past length "
                f"{found} for step 1 of a prompt of 5 with 3 tokens on the rank, active and not; "
                "known is (6, 2) and (6, 3)."
            )

    def _dealt(self, tokens: Sequence[int], rank: int, size: int, block: int) -> list[int]:
        _, positions, _, _ = self.partition(list(tokens), rank, size, block)
        return list(positions)

    @property
    def settings(self) -> dict[str, str]:
        """What was found, for reports."""
        return {
            "checkout": str(self.checkout),
            "prompt": f"{self.split}, by {self.prompt_rule}",
            "owner": f"{self.owner}, by prepare_resources in resource_manager.py",
            "layout": self.layout,
        }


def _compiled(function: ast.FunctionDef, known: dict[str, Any]) -> Any:
    """A function as it stands in the checkout, but for its types and decorators."""
    function.returns, function.decorator_list = None, []
    for argument in function.args.args:
        argument.annotation = None
    module = ast.fix_missing_locations(ast.Module([function], []))
    space = dict(known)
    exec(compile(module, f"<{function.name}>", "exec"), space)
    return space[function.name]


def _function(
    name: str, arguments: list[str], body: list[ast.stmt], known: dict[str, Any]
) -> Callable[..., Any]:
    """A function of these statements, as they stand in the checkout."""
    definition = ast.parse(f"def {name}({', '.join(arguments)}): pass").body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.body = body
    made: Callable[..., Any] = _compiled(definition, known)
    return made


def _llm_request(**given: Any) -> Any:
    """Stands in for `executor_request_to_llm_request`."""
    return SimpleNamespace(child_requests=[], **given)


def _as_partition(merge: Callable[..., Any]) -> Partition:
    """The older method as the function that it became."""

    def partition(
        tokens: list[int], rank: int, size: int, block: int
    ) -> tuple[list[int], list[int], int, int]:
        queue = SimpleNamespace(
            dist=SimpleNamespace(cp_rank=rank, cp_size=size),
            _should_exclude_last_generation_logits=lambda: False,
        )
        asked = SimpleNamespace(input_token_ids=tokens)
        item = SimpleNamespace(id=0, request=asked, child_req_ids=None)
        (request,) = merge(queue, [item], block)
        return request.input_token_ids, request.position_ids, len(tokens), 0

    return partition


def _arithmetic(node: ast.If) -> Callable[[Any], tuple[int, int]]:
    """Position and past length of a request's next token, by the statements under this `if`."""
    lists = ast.parse("helix_is_inactive_rank, helix_position_offsets = [], []").body
    told = ast.parse("return position_id, past_seen_token_num").body
    function = _function(
        "positions", ["request", "beam_width", "request_has_previous_tensor"],
        [*lists, *node.body, *told], {},
    )  # fmt: skip
    return lambda request: tuple(function(request, 1, False))


def _loops(tree: ast.Module, name: str) -> Iterator[ast.For]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            for inner in ast.walk(node):
                if isinstance(inner, ast.For):
                    yield inner


def _names(node: ast.AST) -> set[str]:
    return {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}


def _manager(rank: int, size: int, block: int) -> Any:
    """Stands in for KVCacheManager: the attributes that the loop reads, and a counter."""
    mapping = SimpleNamespace(has_cp_helix=lambda: True, cp_rank=rank, cp_size=size)
    manager = SimpleNamespace(
        mapping=mapping, tokens_per_block=block, _kv_reserve_draft_tokens=0, added=[]
    )
    manager.impl = SimpleNamespace(add_token=manager.added.append)
    return manager


def _request(prompt_len: int, mine: int) -> Any:
    """Stands in for LlmRequest, as admission leaves it."""
    return SimpleNamespace(
        py_request_id=0,
        py_decoding_iter=0,
        total_input_len_cp=prompt_len,
        seqlen_this_rank_cp=mine,
        py_helix_is_inactive_rank=False,
    )


class TrtllmEngine:
    """One rank that places tokens by the rules of a checkout; `engine_of` fills in which."""

    profiles: ClassVar[frozenset[str]] = frozenset({"placement", "lengths"})
    needs_processes: ClassVar[bool] = False
    sources: ClassVar[Sources]
    settings: ClassVar[dict[str, str]] = {}

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`; any layout but that of the checkout is."""
        if config_problem(config) is not None:
            return Outcome(Reason.BAD_CONFIG)
        if config.layout.partition("/")[0] != self.sources.layout:
            return Outcome(Reason.BAD_CONFIG)
        layout = config.rules
        self.max_len, self.size, self.t = config.max_len, layout.cp_size, layout.tokens_per_block
        self.manager = _manager(self.rank % self.size, self.size, self.t)
        self.requests: dict[int, Any] = {}
        self.places: dict[int, int] = {}
        """Where the slots of each request begin, in pages."""
        self.admitted = 0
        return Outcome()

    def apply(self, event: Event) -> Outcome:
        """Let one event happen on this rank."""
        reason = self._refusal(event)
        if reason is not None:
            return Outcome(reason)
        match event:
            case Admit(id, prompt_len):
                return self._admit(id, prompt_len)
            case Decode(ids):
                return self._decode(ids)
            case Release(id):
                del self.requests[id]
        return Outcome()

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """The tokens that the checkout counts on this rank."""
        return RankView(
            {
                id: request.seqlen_this_rank_cp
                for id, request in self.requests.items()
                if ids is None or id in ids
            }
        )

    def _admit(self, id: int, prompt_len: int) -> Outcome:
        cp_rank = self.rank % self.size
        try:
            mine, _, total, _ = self.sources.partition(
                list(range(prompt_len)), cp_rank, self.size, self.t
            )
        except ValueError:  # the one thing that it refuses: fewer blocks than ranks
            return Outcome(Reason.UNSUPPORTED)
        self.requests[id] = _request(total, len(mine))
        self.places[id] = APART * self.admitted
        self.admitted += 1
        return Outcome()

    def _decode(self, ids: list[int]) -> Outcome:
        batch = [self.requests[id] for id in ids]
        for request in batch:
            request.py_decoding_iter += 1
        self.sources.gate(self.manager, batch)
        told = [self.sources.positions(request) for request in batch]
        active = [not request.py_helix_is_inactive_rank for request in batch]
        slots = [
            self._slot(id, past) if mine else -1
            for id, (_, past), mine in zip(ids, told, active, strict=True)
        ]
        positions = [position for position, _ in told]
        return Outcome(None, [past for _, past in told], positions, active, slots)

    def _slot(self, id: int, index: int) -> int:
        return (self.places[id] + index // self.t) * self.t + index % self.t

    def _refusal(self, event: Event) -> Reason | None:
        """SPEC.md, section 6: not the checkout's, whose scheduler is compiled."""
        match event:
            case Admit(id, prompt_len):
                if id in self.requests:
                    return Reason.DUPLICATE_REQUEST
                if prompt_len < 1:
                    return Reason.EMPTY_PROMPT
                return Reason.TOO_LONG if prompt_len > self.max_len else None
            case Decode(ids, query_lens) | Skip(ids, query_lens):
                pad = getattr(event, "pad", 0)
                if max(query_lens, default=1) > 1 or pad > 0:
                    return Reason.UNSUPPORTED
                if not ids or query_lens != [1] * len(ids) or pad < 0:
                    return Reason.BAD_COUNT
                if len(set(ids)) < len(ids):
                    return Reason.DUPLICATE_REQUEST
                if not set(ids) <= self.requests.keys():
                    return Reason.UNKNOWN_REQUEST
                return Reason.TOO_LONG if any(map(self._is_full, ids)) else None
            case Release(id):
                return None if id in self.requests else Reason.UNKNOWN_REQUEST
        return Reason.UNSUPPORTED

    def _is_full(self, id: int) -> bool:
        request = self.requests[id]
        full: bool = request.total_input_len_cp + request.py_decoding_iter >= self.max_len
        return full


def engine_of(path: str) -> type[TrtllmEngine]:
    """The engine of a checkout. Raises SourceError when its rules are not recognised."""
    sources = Sources(Path(path))
    return type("TrtllmEngine", (TrtllmEngine,), {"sources": sources, "settings": sources.settings})
