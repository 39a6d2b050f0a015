"""Causal linear attention with a decay per head, in O(T) time and memory.

Public modules: api (linear_attention, step), reference, xla, pallas_tpu,
pallas_gpu, cost, shapes.

Letters: B batch, T positions, N query heads, K key and value heads, H head
size; J the value channels of a state, also H; C positions of a chunk.
"""
