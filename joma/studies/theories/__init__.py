"""Theories of how attention learns by other authors, one study a file.

Each holds a law against a computation that does not use it, and says in which
setting it shows; `launch/attention.py` runs them.
"""
