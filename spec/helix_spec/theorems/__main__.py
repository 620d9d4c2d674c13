"""`python -m helix_spec.theorems ID` confirms one theorem; without an id it lists them."""

from __future__ import annotations

import sys

import msgspec

from helix_spec.theorems.base import check
from helix_spec.theorems.catalog import contracts_without_theorem, manifest, theorems


def main(arguments: list[str]) -> int:
    """Print one JSON object a line: the result of each theorem, or without ids what there is.

    Parameters
    ----------
    arguments
        Ids of theorems.

    Returns
    -------
    int
        The exit status: 2 for an unknown id, else 0, whatever the verdicts are.
    """
    if not arguments:
        known = {
            "manifest": manifest(),
            "theorems": list(theorems()),
            "contracts_without_theorem": contracts_without_theorem(),
        }
        print(msgspec.json.encode(known).decode())
        return 0
    for identifier in arguments:
        one = theorems().get(identifier)
        if one is None:
            print(f"there is no theorem {identifier}", file=sys.stderr)
            return 2
        print(msgspec.json.encode(check(one)).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
