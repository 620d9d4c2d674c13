"""`helix-conformance init`: the first files of an adapter, which pass `placement` on one layout."""

from __future__ import annotations

from pathlib import Path
from typing import Final

STARTERS: Final = Path(__file__).parent / "starters"
_ENGINES: Final = {
    "python": ("my_engine.py.txt", "my_engine:Placement"),
    "stdio": ("my_stdio_engine.py.txt", "stdio:python3 my_engine.py"),
}
"""The file that each kind of adapter begins with, and what `--engine` calls it."""


def starter_files(kind: str, suite: str) -> dict[str, str]:
    """Return the files that an adapter begins with.

    Parameters
    ----------
    kind : str
        `python`, or `stdio` for an engine of any language.
    suite : str
        What CI installs the suite from, as pip takes it.

    Returns
    -------
    dict of str to str
        The text of each file, by its path in the adapter's folder.

    Examples
    --------
    >>> sorted(starter_files("stdio", "helix-conformance"))
    ['.github/workflows/conformance.yml', 'conformance.sh', 'my_engine.py']
    """
    source, engine = _ENGINES[kind]
    shell, workflow = "conformance.sh", "conformance.yml"
    texts = {name: (STARTERS / f"{name}.txt").read_text() for name in (shell, workflow)}
    return {
        "my_engine.py": (STARTERS / source).read_text(),
        shell: texts[shell].replace("ENGINE", engine),
        f".github/workflows/{workflow}": texts[workflow].replace("SUITE", suite),
    }
