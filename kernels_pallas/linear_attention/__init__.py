"""Causal linear attention with a decay per head, in O(T) time and memory.

Public modules: api (linear_attention, step), reference, xla, pallas_tpu,
pallas_gpu, cost, shapes.
"""
