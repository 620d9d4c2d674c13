"""What ranks tell each other before they go on: that they are about to do the same.

Ranks keep their books without asking each other, which is right only while all of them are told the
same. A rank that is told something else leaves its peers waiting in a collective, or gives them
partials of other requests. To compare is a collective too: once when a mesh or a cache is made, at
admissions, whose K and V a rank may fail to get, and in debugging at every call.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import msgspec
import torch
import torch.distributed as dist

from helix_spec.config import Config


class RanksDisagree(RuntimeError):
    """Ranks were about to do different things; none of them has done anything."""


def compare(what: str, mine: Mapping[str, str], group: dist.ProcessGroup) -> None:
    """Raise, on all ranks of a group alike, unless all of them say the same; each calls it.

    Parameters
    ----------
    what : str
        What is compared, as the beginning of a sentence.
    mine : mapping of str to str
        What this rank says of each point; a point that it leaves out is empty.
    group : ProcessGroup

    Raises
    ------
    RanksDisagree
        With every point in which they differ, and who says what.
    """
    text = msgspec.json.encode(dict(mine))
    digest = int.from_bytes(blake2b(text, digest_size=7).digest())
    if len(set(_gathered_numbers(digest, group))) == 1:
        return
    said = [msgspec.json.decode(one, type=dict[str, str]) for one in _gathered_texts(text, group)]
    names = dict.fromkeys(name for one in said for name in one)
    differences = []
    for name in names:
        by_answer: dict[str, list[int]] = {}
        for rank, one in enumerate(said):
            by_answer.setdefault(one.get(name, ""), []).append(rank)
        if len(by_answer) > 1:
            answers = "; ".join(
                f"{_ranks(ranks)}: {answer or 'none'}" for answer, ranks in by_answer.items()
            )
            differences.append(f"{name} ({answers})")
    raise RanksDisagree(f"{what} differs between the ranks in {', '.join(differences)}.")


def config_points(config: Config) -> dict[str, str]:
    """Return what `compare` compares of a configuration, which may be a wrong one.

    Parameters
    ----------
    config : Config

    Returns
    -------
    dict of str to str

    Examples
    --------
    >>> points = config_points(Config(layout="pr9757/1:C=2,T=4", pages=[3, 3], max_len=8))
    >>> points["layout"], points["model.layers"]
    ('pr9757/1:C=2,T=4', '1')
    """
    points = {name: str(value) for name, value in msgspec.structs.asdict(config).items()}
    if isinstance(config.model, msgspec.Struct):
        del points["model"]
        for name, value in msgspec.structs.asdict(config.model).items():
            points[f"model.{name}"] = str(value)
    return points


def error_in_words(error: BaseException | None) -> str:
    """Return an error as `compare` compares it; nothing for none.

    Parameters
    ----------
    error : BaseException or None

    Examples
    --------
    >>> error_in_words(OSError("the peer is gone"))
    'OSError: the peer is gone'
    """
    return "" if error is None else f"{type(error).__name__}: {error}"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where tensors lie that this group can gather."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _gathered_numbers(mine: int, group: dist.ProcessGroup) -> list[int]:
    own = torch.tensor([mine], dtype=torch.int64, device=_device(group))
    rows = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(rows, own, group=group)
    return [int(row) for row in rows]


def _gathered_texts(mine: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """Every rank's text, as bytes: torch's gathering of objects would unpickle them."""
    lengths = _gathered_numbers(len(mine), group)
    own = torch.zeros(max(lengths), dtype=torch.uint8, device=_device(group))
    own[: len(mine)] = torch.tensor(list(mine), dtype=torch.uint8)
    rows = [torch.empty_like(own) for _ in lengths]
    dist.all_gather(rows, own, group=group)
    return [bytes(row[:length].tolist()) for row, length in zip(rows, lengths, strict=True)]
