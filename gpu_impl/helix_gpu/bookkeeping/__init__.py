"""Counters that all ranks keep alike without communication, and one rank's pages; without torch."""
