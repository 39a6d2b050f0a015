"""Attention on Hopper GPUs: entry (forward, backward), plan, the kernels."""
