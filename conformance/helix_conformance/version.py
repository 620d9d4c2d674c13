"""The suite's version."""

from typing import Final

__version__: Final = "0.2.0"
"""As in pyproject.toml: code that runs from a path has no metadata."""
