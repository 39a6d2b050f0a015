"""Attention over a ring of devices, each of which holds a part of the text.

Public modules: api (attention), order (who holds what). The loops are in
passes.

Letters besides those of `attention`: D devices. T and S are what one device
holds.
"""
