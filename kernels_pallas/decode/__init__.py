"""One decode step over a cache of fixed size that evicts what it used least.

Public modules: api (decode_step), slots (the cache), rule (who goes),
reference, xla, pallas_tpu, pallas_gpu, cost, shapes; paged (pages of a pool).
"""
