"""Contextual sparsity (Deja Vu, arXiv 2310.17157): what a token does not need.

A `capture` of a model trains `predictors`; `contextual_sparsity` decodes with
what they choose, and `contextual_study` holds quality against weights read.
"""
