"""Routers: which heads, branches or layers take part, and by how much."""
