"""Attention that can say what it attends to, without a T x S array.

Public modules: api (attention), drop_in (by jax's and Flax's signatures),
reference, cost, shapes; the implementations are the packages xla, tpu and gpu.

Letters, here and in the three: B batch, T queries, S keys, N query heads, K key
and value heads, H head size. P spans of a query. R tiles of queries, C tiles of
keys, W entries of a list of tiles. U units: heads that are computed together,
of which each has G query heads. I strips: all pairs of a unit and a tile of
queries.
"""
