"""Attention over lists of tiles: what is under both attention ops.

Public modules: visits (which tiles meet, in which order).
"""
