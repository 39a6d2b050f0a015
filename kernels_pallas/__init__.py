"""Attention that says what it attends to; imports jax alone, nothing of ours.

Public modules: masks, selection (which pairs attend), output (results, merge);
the ops attention.api, linear_attention.api,
decode.api, gather_mlp.api; interpret (kernels on any platform, for
tests), aot (compilation for chips that are not there).
"""
