"""What an engine is asked: random traces, workloads, and Hypothesis strategies of both."""
