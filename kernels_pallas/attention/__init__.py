"""Attention that can say what it attends to, without a T x S array.

Public modules: api (attention), reference, cost, shapes; the implementations
are the packages xla, tpu and gpu.
"""
