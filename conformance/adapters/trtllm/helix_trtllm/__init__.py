"""TensorRT-LLM's rules of placement as an engine of the conformance suite.

- `engines`: the rules, read from a source checkout that is not built, and an engine made of them.
"""
