"""One decode step over keys and values in four bits a number.

Public modules: api (attend), codes, reference, pallas_tpu, pallas_gpu, cost.
"""
