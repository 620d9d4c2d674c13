"""`python -m helix_conformance`: the command line."""

from helix_conformance.cli import main

if __name__ == "__main__":
    main(prog_name="python -m helix_conformance")
