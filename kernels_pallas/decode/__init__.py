"""One decode step over a cache of fixed size that evicts what it used least.

Public modules: api (decode_step), slots (the cache), rule (who goes),
reference, xla, pallas_tpu, pallas_gpu, cost, shapes; paged (pages of a pool).

Letters: B batch, N query heads, K key and value heads, G = N / K query heads of
a key head, C slots, H head size. R = B K rows: the key heads of all sequences.
L slots or rows at a time. Of pages: P in the pool, M of a row at most, S slots
of each.
"""
