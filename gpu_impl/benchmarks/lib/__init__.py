"""What the benchmarks share. No script imports another script.

- `timing`: work in turn, timed on the host;
- `report`: tables, files, and sections that may fail;
- `device`: the device that is measured, work timed on it, launched or captured;
- `ranks`: several ranks that measure together;
- `models`: the models whose steps the GPU benchmarks run;
- `kernels`: kernels that only benchmarks launch;
- `exchanges`: ways to exchange and merge partials, and exchanges that are captured;
- `balance`: steps of every layout against the closed form.

With `--dry-run` kernels are interpreted on the CPU. Triton reads that once, when it is imported, so
it is settled here, before any module of this package is imported.
"""

import os
import sys

DRY = "--dry-run" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"
