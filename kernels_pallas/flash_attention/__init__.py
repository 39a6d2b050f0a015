"""Dense attention under a mask, without a T x S array.

Public modules: api (flash_attention), reference, xla, pallas_tpu, pallas_gpu,
cost, shapes.
"""
