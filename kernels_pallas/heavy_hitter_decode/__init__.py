"""One decode step over a cache of fixed size that evicts what it used least.

Public modules: api (heavy_hitter_decode), slots (the cache), rule (who goes),
reference, xla, pallas_tpu, cost, shapes; paged (the same over pages of a pool).
"""
