"""The conformance suite: any engine's placement, pages, cache and attention against the spec.

An event goes one way through the folders:

- `expect`: what must be answered: the recorder plays the reference, vectors hold what it said;
- `generate`: what is asked: random traces, workloads, Hypothesis strategies;
- `drive`: who answers: ranks in this process, in child processes, under torchrun or mpiexec;
- `judge`: what is wrong: every answer against its expectation, causes, smaller traces, coverage;
- `report`: what is shown: the stream of a run, text, diagrams, pages, JUnit, certificates;
- `session`: one run, from options to a verdict.

Beside them: `api` (`check`, `Report`), `cli`, `pytest_plugin` and `suite` (the same as tests of
pytest), `testing` (what an engine's own tests draw from), `engines` (how an engine is named; the
adapter of `helix_gpu`), `prove` (the theorems), `foreign` (text of others, made fit to be shown).
"""

from typing import TYPE_CHECKING, Any

from helix_conformance.version import __version__

if TYPE_CHECKING:
    from helix_conformance.api import Report, check

__all__ = ["Report", "__version__", "check"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: pytest imports the plugin of every installed package at its start.
    if name in ("check", "Report"):
        from helix_conformance import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
