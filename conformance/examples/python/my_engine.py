from helix_spec.config import Config, config_problem
from helix_spec.engine import Outcome, RankView
from helix_spec.events import Admit, Decode, Event, Reason, Release, Skip, features_of
from helix_spec.layouts import layout_name


class Placement:
    profiles = frozenset({"placement"})  # what it wants to be measured by
    needs_processes = False  # True when a rank needs torch.distributed

    def __init__(self, rank: int) -> None:
        self.rank = rank  # global: tp_rank * cp_size + cp_rank

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        if config_problem(config) or layout_name(config.layout) != "pr9757":
            return Outcome(Reason.BAD_CONFIG)
        layout = config.layout
        self.c, self.t, self.max_len = layout.cp_size, layout.tokens_per_block, config.max_len
        self.cp_rank = self.rank % self.c
        self.prompt_len: dict[int, int] = {}
        self.held: dict[int, list[int]] = {}  # tokens of a request, on every rank
        self.numbers: dict[int, int] = {}
        return Outcome()

    def apply(self, event: Event) -> Outcome:
        reason = self.refusal(event)
        if reason is not None:
            return Outcome(reason)  # and nothing has changed
        match event:
            case Admit(id, prompt_len):
                self.prompt_len[id], self.held[id] = prompt_len, self.split(prompt_len)
            case Decode(ids):
                return self.decode(ids)
            case Release(id):
                del self.prompt_len[id], self.held[id]
        return Outcome()  # of a skip, too: it changes nothing

    def decode(self, ids: list[int]) -> Outcome:
        outcome = Outcome(None, [], [], [], [])
        for id in ids:
            owner = self.owner(id)
            outcome.past_len.append(self.held[id][self.cp_rank])
            outcome.position_ids.append(sum(self.held[id]))
            outcome.active.append(owner == self.cp_rank)
            outcome.slots.append(self.slot(id) if owner == self.cp_rank else -1)
            self.held[id][owner] += 1
        return outcome

    def split(self, prompt_len: int) -> list[int]:
        """Yours: prompt tokens on each rank. Whole blocks, the first ranks take one more."""
        blocks = -(-prompt_len // self.t)
        ends = [(r + 1) * (blocks // self.c) + min(r + 1, blocks % self.c) for r in range(self.c)]
        tokens = [min(prompt_len, end * self.t) for end in ends]
        return [end - start for start, end in zip([0, *tokens], tokens)]

    def owner(self, id: int) -> int:
        """Yours: the rank of the next token. Turns of one block, from rank 0 on."""
        step = sum(self.held[id]) - self.prompt_len[id]
        return step // self.t % self.c

    def slot(self, id: int) -> int:
        """Yours: where the next token is written. Here a thousand pages for each request."""
        number = self.numbers.setdefault(id, len(self.numbers))
        page, offset = divmod(self.held[id][self.cp_rank], self.t)
        return (1000 * number + page) * self.t + offset

    def observe(self, ids: list[int] | None = None) -> RankView:
        asked = self.held if ids is None else [id for id in ids if id in self.held]
        return RankView({id: self.held[id][self.cp_rank] for id in asked})

    def refusal(self, event: Event) -> Reason | None:
        """SPEC.md, section 6: the first reason that applies."""
        if not features_of(event) <= self.profiles:
            return Reason.UNSUPPORTED
        match event:
            case Admit(id, prompt_len):
                if id in self.held:
                    return Reason.DUPLICATE_REQUEST
                if prompt_len < 1:
                    return Reason.EMPTY_PROMPT
                return Reason.TOO_LONG if prompt_len > self.max_len else None
            case Decode(ids, query_lens) | Skip(ids, query_lens):
                if not ids or query_lens != [1] * len(ids) or getattr(event, "pad", 0) < 0:
                    return Reason.BAD_COUNT
                if len(set(ids)) < len(ids):
                    return Reason.DUPLICATE_REQUEST
                if not set(ids) <= self.held.keys():
                    return Reason.UNKNOWN_REQUEST
                longest = max(sum(self.held[id]) for id in ids)
                return Reason.TOO_LONG if longest >= self.max_len else None
            case Release(id):
                return None if id in self.held else Reason.UNKNOWN_REQUEST
        return Reason.UNSUPPORTED


class Mistaken(Placement):
    def owner(self, id: int) -> int:
        return sum(self.held[id]) // self.t % self.c


class Lengths(Placement):
    profiles = frozenset({"placement", "lengths"})


class Pages(Lengths):
    profiles = frozenset({"placement", "lengths", "pages"})

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        self.pools = config.pages
        self.tables: dict[int, list[int]] = {}  # yours: the block tables of this rank
        outcome = super().start(config, profiles)
        if outcome.reason is None:
            self.free = list(range(self.pools[self.cp_rank]))  # yours: the allocator
        return outcome

    def refusal(self, event: Event) -> Reason | None:
        reason = super().refusal(event)
        if reason is not None:
            return reason
        more = [0] * self.c
        match event:
            case Admit(_, prompt_len):
                more = [self.pages_of(tokens) for tokens in self.split(prompt_len)]
            case Decode(ids) | Skip(ids):
                for id in ids:
                    owner = self.owner(id)
                    more[owner] += self.held[id][owner] % self.t == 0
        for rank, pool in enumerate(self.pools):
            used = sum(self.pages_of(held[rank]) for held in self.held.values())
            if used + more[rank] > pool:
                return Reason.OUT_OF_PAGES
        return None

    def apply(self, event: Event) -> Outcome:
        outcome = super().apply(event)
        if outcome.reason is None and isinstance(event, Release):
            self.free += self.tables.pop(event.id)
        if outcome.reason is None and isinstance(event, Admit):
            self.tables[event.id] = []
            self.reserve(event.id, self.held[event.id][self.cp_rank])
        return outcome

    def slot(self, id: int) -> int:
        index = self.held[id][self.cp_rank]
        self.reserve(id, index + 1)
        return self.tables[id][index // self.t] * self.t + index % self.t

    def reserve(self, id: int, tokens: int) -> None:
        while len(self.tables[id]) < self.pages_of(tokens):
            self.tables[id].append(self.free.pop())

    def pages_of(self, tokens: int) -> int:
        return -(-tokens // self.t)

    def observe(self, ids: list[int] | None = None) -> RankView:
        lens = super().observe(ids).local_len
        return RankView(lens, {id: list(self.tables[id]) for id in lens}, [], len(self.free))


class Eager(Lengths):
    def decode(self, ids: list[int]) -> Outcome:
        outcome = super().decode(ids)
        outcome.past_len[:] = [tokens + 1 for tokens in outcome.past_len]
        return outcome


class FourRanks(Lengths):
    capabilities = {"cp_size": [4], "tokens_per_block": {"min": 16, "max": 128}}
