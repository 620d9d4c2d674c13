"""Ranks as a mesh, and how partials travel between them."""
