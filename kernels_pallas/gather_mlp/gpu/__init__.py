"""Gathered MLPs on Hopper GPUs: entry (the three ops), and the kernels."""
