"""Attention kernels in Pallas; imports jax and nothing of this project.

No public module yet.
"""
