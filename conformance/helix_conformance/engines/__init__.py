"""Adapters that put engines behind the protocol."""
