"""Attention on TPUs: entry (forward, backward), plan (tiles), the kernels."""
