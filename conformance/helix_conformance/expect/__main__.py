"""`python -m helix_conformance.expect` writes the shipped set anew, and drops what left it."""

from helix_conformance.expect.making import export, make_all
from helix_conformance.expect.vectors import SHIPPED

for stale in {path.name for path in SHIPPED.iterdir()} - make_all().keys():
    (SHIPPED / stale).unlink()
print(f"wrote {len(export(SHIPPED))} files to {SHIPPED}")
