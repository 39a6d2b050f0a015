"""One decode step over pages of a pool, of which each head owns its own number.

Public modules: api (paged_decode), rule, reference, xla, pallas_tpu.
"""
