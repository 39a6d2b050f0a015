"""Layers as one, or one by one; their matrices.

Public modules: scanning, projections, products, monarch.
"""
