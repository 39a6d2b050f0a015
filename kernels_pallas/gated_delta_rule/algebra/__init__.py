"""The algebra of one chunk of one head, which XLA and the TPU kernels share.

Modules: chunk (both passes), fading (what decays leave), inverse, products.
"""
