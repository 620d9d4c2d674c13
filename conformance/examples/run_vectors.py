"""Runs test vectors against a Python engine: `python run_vectors.py FOLDER module:Class`.

It follows the numbered steps of FORMAT.md and shares nothing with the suite but the types that an
engine is called with. A runner in another language looks like this one.
"""

import importlib
import json
import sys
from pathlib import Path

import msgspec
import numpy as np

from helix_spec.config import Config, decode_layout
from helix_spec.events import Event


def differences(vector, engine_class):
    """Yield a sentence for each answer that is not what the vector says, up to the first event."""
    config = msgspec.convert(vector["config"], Config, dec_hook=decode_layout)
    cp, world = config.layout.cp_size, config.world_size
    ranks = [engine_class(rank) for rank in range(world)]
    profiles = {"placement", "lengths", "pages", *vector["profiles"]}
    profiles |= {"cache"} if vector.get("rows") else set()
    profiles |= {"cache", "attention"} if '"output"' in json.dumps(vector["steps"]) else set()
    checked = frozenset(profiles & engine_class.profiles)
    for rank in ranks:
        if rank.start(config, checked).reason != vector.get("refused"):
            yield f"start: rank {rank.rank} is expected to say {vector.get('refused')}"
    numbers = [{} for _ in ranks]  # on each rank, by cache group: the page of each label
    for index, step in enumerate([] if vector.get("refused") else vector["steps"]):
        event = msgspec.convert(step["event"], Event)
        answers = [rank.apply(event) for rank in ranks]
        wrong = [a.reason for a in answers if a.reason != step.get("refused")]
        for r, answer in enumerate([] if wrong else answers):
            for name, told, place, alone in parts(step, config, r % cp):
                pages = numbers[r].setdefault(name, {})
                if told.get("decoded"):
                    own = answer.of_group(name) if name else answer
                    wrong += columns(told["decoded"], own, place, pages, alone)
                if told.get("state"):
                    view = ranks[r].observe()
                    if name:
                        pool = next(one.pool for one in config.groups if one.name == name)
                        free = view.pools.get(pool, view.free_pages)
                        view = msgspec.structs.replace(view.of_group(name), free_pages=free)
                    wrong += state(vector, told["state"], view, r, place, pages, alone)
            if (step.get("decoded") or {}).get("output") or step.get("merged"):
                wrong += outputs(step, answer, r, world)
        if wrong:
            yield f"event {index}: {wrong[0]}"
            return


def parts(step, config, cp_rank):
    """Yield what a step says of each cache group: name, entry, the rank there, configuration."""
    if not config.groups:
        yield None, step, cp_rank, config
    for group in config.groups:
        copy, told = group.placement == "replicated", step["groups"][group.name]
        place, entry = (0, told[cp_rank]) if copy else (cp_rank, told[0])
        yield group.name, entry, place, config.alone(group, cp_rank)


def columns(decoded, answer, cp_rank, numbers, config):
    """Compare the columns of an accepted decode on one rank."""
    mine = [owner == cp_rank for owner in decoded["owners"]]
    past, seen = ([row[cp_rank] for row in decoded[name]] for name in ("past_len", "visible"))
    right = {"past_len": past, "position_ids": decoded["position_ids"], "active": mine}
    yield from (name for name, column in right.items() if getattr(answer, name) != column)
    if answer.visible is not None and answer.visible != seen:
        yield "visible"
    for (label, offset), owned, slot in zip(decoded["slots"], mine, answer.slots, strict=True):
        page, given = divmod(slot, config.layout.tokens_per_block)
        if owned and (slot < 0 or given != offset or moved(numbers, label, page)):
            yield f"slot {slot}"
        if not owned and slot != -1:
            yield f"slot {slot} where the token is not"


def moved(numbers, label, page):
    """Whether a label stands for another page than before, or the page for another label."""
    return numbers.setdefault(label, page) != page or list(numbers.values()).count(page) > 1


def outputs(step, answer, rank, world):
    """Compare one rank's slice of the merged outputs with the exact ones and their bounds."""
    told = step["decoded"]["output"] if step.get("decoded") else [step["merged"]["output"]]
    given = np.asarray(answer.output, dtype=float).reshape(len(told), len(told[0]), -1)
    for layer, by_token in enumerate(told):
        for token, heads in enumerate(by_token):
            share = len(heads) // world
            rows = given[layer, token].reshape(share, -1)
            for row, (exact, bound) in zip(rows, heads[rank * share :][:share], strict=True):
                if not np.linalg.norm(row - np.array(exact)) <= bound:
                    yield f"output of token {token} on rank {rank}"


def state(vector, right, view, rank, r, numbers, config):
    """Compare what one rank holds: lengths, pages by their labels, cached rows."""
    tables = right["block_tables"]
    if view.local_len != {int(id): row[r] for id, row in right["local_len"].items()}:
        yield f"local_len {view.local_len}"
    if [view.free_pages, view.preempted] != [right["free_pages"][r], right.get("preempted", [])]:
        yield f"{view.free_pages} free pages, preempted {view.preempted}"
    held = {label for by_rank in tables.values() for label in by_rank[r]} - {-1}
    for label in numbers.keys() - held:
        del numbers[label]
    for id, by_rank in tables.items():
        table = view.block_tables.get(int(id), [])
        pages = [pair for pair in zip(by_rank[r], table, strict=False) if pair != (-1, -1)]
        if len(table) != len(by_rank[r]) or any([moved(numbers, *pair) for pair in pages]):
            yield f"block table {table} of request {id}"
        heads = config.kv_heads_of(rank // config.layout.cp_size)
        for name in ("keys", "values") if right.get("cached") else ():
            rows = np.asarray(getattr(view, name)[int(id)], dtype=float)
            yield from cached(vector, right, id, r, name, rows, heads)


def cached(vector, right, id, r, name, rows, heads):
    """Compare cached keys or values of one request: layers, slots, heads, dim."""
    low, high = ("least_keys", "most_keys") if name == "keys" else ("values", "values")
    for index, row in enumerate(right["cached"][id][r]):
        least, most = (np.array(vector["rows"][row][bound])[:, heads] for bound in (low, high))
        if not ((least <= rows[:, index]) & (rows[:, index] <= most)).all():
            yield f"{name} of request {id} at local index {index}"
    unwritten = rows[:, right["unwritten_from"][id][r] :]
    if vector["config"].get("poison", True) and not np.isnan(unwritten).all():
        yield f"{name} of request {id} beyond what was written"


def main(folder, spec):
    """Run all vectors of a folder; the exit status is 1 when one fails."""
    module, _, name = spec.partition(":")
    engine, failed = getattr(importlib.import_module(module), name), 0
    for path in sorted(Path(folder).glob("*.json")):
        vector = json.loads(path.read_text())
        if "steps" in vector and set(vector["profiles"]) <= engine.profiles:
            found = next(differences(vector, engine), None)
            failed += found is not None
            print(f"{path.name}: {found or 'right'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
