"""Selectors: which blocks of keys each query may read."""
