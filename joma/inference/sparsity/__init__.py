"""Contextual sparsity (Deja Vu, arXiv 2310.17157): what a token does not need.

`contextual_sparsity` is a Transformer that follows a `plan`: `sparse_mlp` and
`sparse_heads` compute what `unit_rules` choose, with `predictors` or without,
and `lazy_kv` keeps what heads left out. `study` holds quality against weights
read.
"""
