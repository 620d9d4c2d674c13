"""Coverage-guided fuzzing of every parser: `make fuzz`, for SECONDS in all.

First the large inputs, each with the time and the memory that it took; then atheris mutates valid
inputs of one parser after the other, each in a process of its own that may use neither much time
for one input nor much memory. Anything but a parse or the promised error ends the run, and the
input is left under `helix-failures/`.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import click

FAILURES: Final = Path("helix-failures")
LIMIT_S: Final = 20
"""Seconds that one input may take."""
LIMIT_MB: Final = 2048
"""Memory that a process may take."""


def one(name: str, seconds: int) -> None:
    """Mutate inputs of one parser; does not return."""
    import atheris

    # The parsers are loaded here, and not before, so that their branches are seen.
    with atheris.instrument_imports(include=["helix_spec", "helix_conformance"]):
        from suite_testing.inputs import HOSTILE, PARSERS, complaint
    parser = next(parser for parser in PARSERS if parser.name == name)

    def check(data: bytes) -> None:
        complaint(parser, data)

    corpus = Path(tempfile.mkdtemp(prefix="helix-corpus-"))
    (corpus / "valid").write_bytes(parser.valid)
    for number, hostile in enumerate(HOSTILE):
        (corpus / f"hostile-{number}").write_bytes(hostile[:4096])
    FAILURES.mkdir(exist_ok=True)
    atheris.Setup(
        [
            *(sys.argv[0], str(corpus), f"-max_total_time={seconds}", f"-timeout={LIMIT_S}"),
            *(f"-rss_limit_mb={LIMIT_MB}", "-max_len=4096", "-print_final_stats=1", "-verbosity=0"),
            f"-artifact_prefix={FAILURES}/fuzz-{parser.name}-",
        ],
        check,
    )
    atheris.Fuzz()


def large() -> bool:
    """Read the large inputs; whether each ended as it should, within the limits."""
    from inputs import PARSERS, bounded_but_large, complaint

    good = True
    for name, data in bounded_but_large():
        parser = next(parser for parser in PARSERS if parser.name == name)
        began = time.perf_counter()
        said = complaint(parser, data)
        seconds = time.perf_counter() - began
        mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        good = good and seconds < LIMIT_S and mib < LIMIT_MB
        verdict = "parsed" if said is None else f"refused, in {len(said)} characters"
        print(f"{name:18} {len(data):>10} bytes {seconds:6.2f} s {mib:6.0f} MiB peak: {verdict}")
    return good


@click.command()
@click.option("--seconds", default=120, show_default=True, help="For all parsers together.")
@click.option("--parser", "name", help="This one alone, by its name in inputs.py.")
def main(seconds: int, name: str | None) -> None:
    """Fuzz all parsers, or one."""
    if name is not None:
        one(name, seconds)
    from inputs import PARSERS

    good = large()
    each = max(1, seconds // len(PARSERS))
    for parser in PARSERS:
        words = [sys.executable, __file__, "--parser", parser.name, "--seconds", str(each)]
        done = subprocess.run(words, capture_output=True, text=True)
        stats = dict(
            line.removeprefix("stat::").split(":", 1)
            for line in done.stderr.splitlines()
            if line.startswith("stat::")
        )
        runs = stats.get("number_of_executed_units", "?").strip()
        peak = stats.get("peak_rss_mb", "?").strip()
        verdict = "no complaint" if done.returncode == 0 else "FAILED"
        print(f"{parser.name:18} {runs:>9} inputs in {each} s, {peak} MiB peak: {verdict}")
        if done.returncode:
            good = False
            print(done.stdout[-1500:], done.stderr[-3000:])
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
