"""Measurements of single statements, one function each; see `theorems`.

Modules: decoder, attention, oracles.
"""
