"""What the adapters of other engines share: their requests, their findings, Triton on a CPU.

- `requests`: what is known of each request, and the refusals that follow from it;
- `triton_on_cpu`: what Triton's interpreter lacks for the kernels of other engines;
- `findings`: whether what a FINDINGS.md says still shows;
- `matrix`: the page of engines and what they pass, from the streams of their runs.
"""
