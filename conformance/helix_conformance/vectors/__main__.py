"""`python -m helix_conformance.vectors` writes the shipped set anew, and drops what left it."""

from helix_conformance.vectors.making import SHIPPED, export, make_all

for stale in {path.name for path in SHIPPED.iterdir()} - make_all().keys():
    (SHIPPED / stale).unlink()
print(f"wrote {len(export(SHIPPED))} files to {SHIPPED}")
