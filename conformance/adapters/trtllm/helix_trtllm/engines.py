"""TensorRT-LLM's own Python rules of placement, out of a source checkout that is not built.

`--engine trtllm:PATH` reads the functions that place tokens from the user's checkout, by their
syntax trees: the package is never imported. They are run as they stand, with small stand-ins for
what is compiled (`impl.add_token` and `resize` count). What is found decides the layout:

| rule | where | found as |
|---|---|---|
| prompt | `partition_context_for_helix` in `request_utils.py`, or the older | contiguous or |
| | `_merge_helix_requests` in `executor_request_queue.py` | round_robin |
| owner | `try_allocate_generation` of `KVCacheManagerV2`, | step or position |
| | or, where that knows nothing of Helix, the loop of `prepare_resources` | step or last_rank |
| | in `resource_manager.py` | |
| positions, past lengths | the file that reads `total_input_len_cp` under `has_cp_helix` | |

A checkout in which one of them is missing, or does something else, is refused before any work.
Pages are taken by compiled code, so `pages` is not declared; the slots are this module's own, of
the local index that the counts give. So is the order in which an executor calls these functions:
a request is scheduled, then its positions are computed, and `py_decoding_iter` advances when its
token is sampled, which with the overlap scheduler may be after the next step was prepared.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Final, Protocol

from helix_spec.config import Config, config_problem
from helix_spec.engine import Outcome, RankView
from helix_spec.events import Admit, Decode, Event, Reason, Release, Sampled, Skip
from helix_spec.layouts import layout_name

FOLDER: Final = Path("tensorrt_llm/_torch/pyexecutor")
PARTITION: Final = "partition_context_for_helix"
OLDER_PARTITION: Final = "_merge_helix_requests"
ALLOCATE: Final = "try_allocate_generation"
REVERT: Final = "revert_allocate_generation"
LEDGER: Final = frozenset({ALLOCATE, REVERT, "_set_helix_rank_fields", "_helix_local_len"})
"""The methods of KVCacheManagerV2 that are run."""
LAYOUTS: Final = {
    ("contiguous", "last_rank"): "before_9757",
    ("contiguous", "step"): "pr9757",
    ("round_robin", "step"): "pr13180",
    ("round_robin", "position"): "pr17866",
}
"""The layout of each prompt split and owner rule that can be found."""
APART: Final = 10**6
"""Pages kept for each request: this engine allocates none."""

Partition = Callable[[list[int], int, int, int], tuple[list[int], list[int], int, int]]
Positions = Callable[[Any, bool], tuple[int, int]]
"""Position and past length of a request's next token; given whether the one before is unsampled."""


class SourceError(ValueError):
    """A checkout whose rules are not there or not known; the message names file and function."""


class Sources:
    """The rules that place tokens in one checkout.

    Raises SourceError, in a sentence, for a checkout in which they are not recognised.
    """

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.partition = self._partition()
        self.manager = self._manager()
        self.positions = self._positions()
        self.split, self.owner = self._split(), self._owner()
        self._check_positions()
        if (self.split, self.owner) not in LAYOUTS:
            raise SourceError(f"No layout has {self.split} prompts and {self.owner} owners.")
        self.layout = LAYOUTS[self.split, self.owner]

    def _tree(self, name: str | Path, *, missing_is_fine: bool = False) -> ast.Module:
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

    def _manager(self) -> type[Manager]:
        """The manager of KV caches that decides which rank is active."""
        for path in sorted((self.checkout / FOLDER).rglob("kv_cache_manager_v2.py")):
            methods = _methods(self._tree(path), "KVCacheManagerV2")
            if "py_helix_is_inactive_rank" not in {n for m in methods for n in _names(m)}:
                continue
            missing = {ALLOCATE, REVERT} - {method.name for method in methods}
            if missing:
                raise SourceError(f"KVCacheManagerV2 in {path} has no {' and no '.join(missing)}.")
            self.owner_rule = f"KVCacheManagerV2.{ALLOCATE} in {path.name}"
            return type("Ledger", (Ledger,), {m.name: _compiled(m, {}) for m in methods})
        for loop in _loops(self._tree("resource_manager.py"), "prepare_resources"):
            if "py_helix_is_inactive_rank" in _names(loop):
                self.owner_rule = "prepare_resources in resource_manager.py"
                loop.iter = ast.Name("requests", ast.Load())
                gate = _function(
                    "gate", ["self", "requests"], [loop], {"get_draft_token_length": lambda _: 0}
                )
                return type("Gate", (Gate,), {"gate": gate})
        raise SourceError(
            f"{self.checkout / FOLDER} has no {ALLOCATE} of KVCacheManagerV2, and its "
            "resource_manager.py has no loop in prepare_resources, that sets "
            "py_helix_is_inactive_rank; an owner rule kept elsewhere is not known."
        )

    def _positions(self) -> Positions:
        """The arithmetic of positions and past lengths."""
        reads = {"total_input_len_cp", "py_decoding_iter", "seqlen_this_rank_cp"}
        folder = self.checkout / FOLDER
        for path in sorted(folder.rglob("*.py")):
            text = path.read_bytes()
            if not all(name.encode() in text for name in reads):
                continue
            for node in ast.walk(self._tree(path)):
                if not isinstance(node, ast.If) or "has_cp_helix" not in ast.dump(node.test):
                    continue
                if reads <= _names(node):
                    self.position_rule = str(path.relative_to(folder))
                    return _arithmetic(node)
        raise SourceError(
            f"{folder} does not compute positions from total_input_len_cp and py_decoding_iter "
            "under has_cp_helix, in any file; its rule is not known."
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
        """Which of the owner rules it is: a prompt of 3, two ranks, pages of 2, five steps."""
        try:
            found = [self._active(rank) for rank in range(2)]
        except (NameError, AttributeError) as error:
            raise SourceError(f"{self.owner_rule} reads something else: {error}.") from error
        known = {
            "step": [[1, 1, 0, 0, 1], [0, 0, 1, 1, 0]],
            "position": [[0, 1, 1, 0, 0], [1, 0, 0, 1, 1]],
            "last_rank": [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
        }
        for owner, right in known.items():
            if found == right:
                return owner
        raise SourceError(
            f"{self.owner_rule} makes ranks 0 and 1 active, with pages of 2 and a prompt of 3, in "
            f"steps {found}; that is no rule of these: step, position, last_rank."
        )

    def _active(self, rank: int) -> list[int]:
        """Whether a rank of two is active, in each of five steps."""
        manager = self.manager(rank, 2, 2)
        request = manager.request(3, 2 - rank)
        steps = []
        for _ in range(5):
            manager.schedule(request)
            request.py_decoding_iter = max(1, request.py_decoding_iter) + 1
            steps.append(int(not request.py_helix_is_inactive_rank))
        manager.skip(manager.request(3, 2 - rank))  # reads what it reads
        return steps

    def _check_positions(self) -> None:
        """Position and past length of the second step of a request, active and not."""
        found = []
        for inactive in (False, True):
            request = _request(5, 3)
            request.py_decoding_iter, request.py_helix_is_inactive_rank = 2, inactive
            try:
                found.append(self.positions(request, False))
                self.positions(request, True)  # reads what it reads
            except (NameError, AttributeError) as error:
                raise SourceError(
                    f"{self.position_rule} reads something else for its positions: {error}."
                ) from error
        if found != [(6, 2), (6, 3)]:
            raise SourceError(
                f"{self.position_rule} gives position and past length "
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
            "owner": f"{self.owner}, by {self.owner_rule}",
            "positions": self.position_rule,
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


def _arithmetic(node: ast.If) -> Positions:
    """Position and past length of a request's next token, by the statements under this `if`."""
    lists = ast.parse("helix_is_inactive_rank, helix_position_offsets = [], []").body
    told = ast.parse("return position_id, past_seen_token_num").body
    function = _function(
        "positions", ["request", "beam_width", "request_has_previous_tensor"],
        [*lists, *node.body, *told], {},
    )  # fmt: skip
    return lambda request, unsampled: tuple(function(request, 1, unsampled))


def _methods(tree: ast.Module, name: str) -> list[ast.FunctionDef]:
    """Those of LEDGER that the class of this name has."""
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    return [
        node
        for found in classes
        for node in found.body
        if isinstance(node, ast.FunctionDef) and node.name in LEDGER
    ]


def _loops(tree: ast.Module, name: str) -> Iterator[ast.For]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            for inner in ast.walk(node):
                if isinstance(inner, ast.For):
                    yield inner


def _names(node: ast.AST) -> set[str]:
    return {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}


class Manager(Protocol):
    """One rank's manager of KV caches, as far as it places tokens."""

    def __init__(self, rank: int, size: int, block: int) -> None: ...

    def request(self, prompt_len: int, mine: int) -> Any:
        """A request as admission leaves it; `mine` of its prompt's tokens are on this rank."""

    def schedule(self, request: Any) -> None:
        """Says whether this rank is active in the request's next step, and counts its token."""

    def skip(self, request: Any) -> None:
        """A step is prepared, as far as a step is that is never run."""


class Gate:
    """Stands in for KVCacheManager: the attributes that its loop reads, and a counter."""

    gate: ClassVar[Callable[[Any, list[Any]], None]]

    def __init__(self, rank: int, size: int, block: int) -> None:
        self.mapping = SimpleNamespace(has_cp_helix=lambda: True, cp_rank=rank, cp_size=size)
        self.tokens_per_block = block
        self._kv_reserve_draft_tokens = 0
        self.impl = SimpleNamespace(add_token=lambda _: None)

    def request(self, prompt_len: int, mine: int) -> Any:
        """A request whose prompt has arrived."""
        request = _request(prompt_len, mine)
        request.py_decoding_iter = 1  # the end of the prompt's transfer sets it
        return request

    def schedule(self, request: Any) -> None:
        """One turn of the loop."""
        self.gate([request])

    def skip(self, request: Any) -> None:
        """Nothing: prepare_resources is called for steps that run."""


class Ledger:
    """Stands in for KVCacheManagerV2: what its methods read, and a cache that counts tokens."""

    try_allocate_generation: ClassVar[Callable[[Any, Any], bool]]
    revert_allocate_generation: ClassVar[Callable[[Any, Any], None]]

    def __init__(self, rank: int, size: int, block: int) -> None:
        self._has_cp_helix, self.is_draft = True, False
        self._helix_cp_rank, self._helix_cp_size = rank, size
        self.tokens_per_block, self._ledger_tokens_per_block = block, block * size
        self._allocated_draft_lens: dict[int, int] = {}
        self.kv_cache_map: dict[int, Cache] = {}

    def _effective_draft_len(self, _request: Any) -> int:
        return 0

    _generation_draft_slots = _effective_draft_len

    def _required_gen_capacity(self, _request: Any, capacity: int) -> int:
        return capacity + 1

    def request(self, prompt_len: int, mine: int) -> Any:
        """A request, and the cache that its prompt fills."""
        request = _request(prompt_len, mine)
        request.py_request_id = len(self.kv_cache_map)
        self.kv_cache_map[request.py_request_id] = Cache(prompt_len)
        return request

    def schedule(self, request: Any) -> None:
        """The scheduler takes room for a token."""
        if not self.try_allocate_generation(request):
            raise RuntimeError(f"{ALLOCATE} refused a token, though its cache never refuses one.")

    def skip(self, request: Any) -> None:
        """The scheduler took a step's token and gives it back."""
        self.schedule(request)
        self.revert_allocate_generation(request)


class Cache:
    """Stands in for the compiled cache of one request: it has room for any number of tokens."""

    is_active = True

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def resize(self, capacity: int | None, history_length: int | None = None) -> bool:
        """Grows or shrinks the cache; always can."""
        self.capacity = self.capacity if capacity is None else capacity
        return True


def _request(prompt_len: int, mine: int) -> Any:
    """Stands in for LlmRequest, as admission leaves it."""
    return SimpleNamespace(
        py_request_id=0,
        py_decoding_iter=0,
        py_helix_decode_group_index=0,
        total_input_len_cp=prompt_len,
        seqlen_this_rank_cp=mine,
        py_helix_is_inactive_rank=False,
        is_dummy_request=False,
    )


@dataclass(slots=True)
class Held:
    """A live request on one rank."""

    request: Any
    first_page: int
    local_len: int
    """What the checkout counted when this request's last step ran: a step that is prepared and
    never run may leave its token in the count until the next is scheduled."""
    decoded: int = 0
    unsampled: int = 0
    """Decodes outstanding, with the overlap scheduler."""


class TrtllmEngine:
    """One rank that places tokens by the rules of a checkout; `engine_of` fills in which."""

    profiles: ClassVar[frozenset[str]] = frozenset({"placement", "lengths", "overlap"})
    needs_processes: ClassVar[bool] = False
    sources: ClassVar[Sources]
    settings: ClassVar[dict[str, str]] = {}

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`; any layout but that of the checkout is."""
        if config_problem(config) is not None:
            return Outcome(Reason.BAD_CONFIG)
        if layout_name(config.layout) != self.sources.layout:
            return Outcome(Reason.BAD_CONFIG)
        layout = config.layout
        self.max_len, self.size, self.t = config.max_len, layout.cp_size, layout.tokens_per_block
        self.overlap = config.overlap
        self.manager = self.sources.manager(self.rank % self.size, self.size, self.t)
        self.requests: dict[int, Held] = {}
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
            case Skip(ids):
                for id in ids:
                    self.manager.skip(self.requests[id].request)
            case Sampled(ids):
                for id in ids:
                    self.requests[id].unsampled -= 1
                    self.requests[id].request.py_decoding_iter += 1
            case Release(id):
                del self.requests[id]
        return Outcome()

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """The tokens that the checkout counts on this rank."""
        return RankView(
            {id: held.local_len for id, held in self.requests.items() if ids is None or id in ids}
        )

    def _admit(self, id: int, prompt_len: int) -> Outcome:
        cp_rank = self.rank % self.size
        try:
            mine, _, total, _ = self.sources.partition(
                list(range(prompt_len)), cp_rank, self.size, self.t
            )
        except ValueError:  # the one thing that it refuses: fewer blocks than ranks
            return Outcome(Reason.UNSUPPORTED)
        request = self.manager.request(total, len(mine))
        self.requests[id] = Held(request, APART * self.admitted, len(mine))
        self.admitted += 1
        return Outcome()

    def _decode(self, ids: list[int]) -> Outcome:
        told = Outcome(None, [], [], [], [])
        for id in ids:
            held = self.requests[id]
            past, position = self._step(held)
            active = not held.request.py_helix_is_inactive_rank
            told.past_len.append(past)
            told.position_ids.append(position)
            told.active.append(active)
            told.slots.append(self._slot(held, past) if active else -1)
        return told

    def _step(self, held: Held) -> tuple[int, int]:
        """One step of a request: its past length and position."""
        request = held.request
        self.manager.schedule(request)
        # Before the first step runs, the end of the prompt's transfer sets it to 1.
        request.py_decoding_iter = max(1, request.py_decoding_iter)
        position, past = self.sources.positions(request, held.unsampled > 0)
        held.local_len = request.seqlen_this_rank_cp
        held.decoded += 1
        if self.overlap:
            held.unsampled += 1
        else:
            request.py_decoding_iter += 1
        return past, position

    def _slot(self, held: Held, index: int) -> int:
        return (held.first_page + index // self.t) * self.t + index % self.t

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
                known = [self.requests[id] for id in ids if id in self.requests]
                if any(held.unsampled == 2 for held in known):
                    return Reason.BAD_COUNT
                if len(set(ids)) < len(ids):
                    return Reason.DUPLICATE_REQUEST
                if len(known) < len(ids):
                    return Reason.UNKNOWN_REQUEST
                return Reason.TOO_LONG if any(map(self._is_full, known)) else None
            case Sampled(ids) if self.overlap:
                if not ids:
                    return Reason.BAD_COUNT
                if len(set(ids)) < len(ids):
                    return Reason.DUPLICATE_REQUEST
                if not set(ids) <= self.requests.keys():
                    return Reason.UNKNOWN_REQUEST
                open_ = all(self.requests[id].unsampled for id in ids)
                return None if open_ else Reason.NOTHING_OPEN
            case Release(id):
                return None if id in self.requests else Reason.UNKNOWN_REQUEST
        return Reason.UNSUPPORTED

    def _is_full(self, held: Held) -> bool:
        full: bool = held.request.total_input_len_cp + held.decoded >= self.max_len
        return full


def engine_of(path: str) -> type[TrtllmEngine]:
    """The engine of a checkout. Raises SourceError when its rules are not recognised."""
    sources = Sources(Path(path))
    return type("TrtllmEngine", (TrtllmEngine,), {"sources": sources, "settings": sources.settings})
