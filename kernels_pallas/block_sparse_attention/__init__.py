"""Attention to the key blocks that a data-dependent Selection lists.

Public modules: api (block_sparse_attention), reference, xla, pallas_tpu,
pallas_gpu, cost, shapes.
"""
