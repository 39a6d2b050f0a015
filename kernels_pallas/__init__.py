"""Attention that says what it attends to; imports jax alone, nothing of ours.

Public modules: masks, selection (which pairs attend), output (results, merge),
logits (one definition of soft-capped grouped logits); the ops attention.api,
linear_attention.api, gated_delta_rule.api, decode.api, gather_mlp.api; hardware
(what ops share of a chip); interpret (kernels on any platform, for tests), aot
(compilation for chips that are not there).

Letters of shapes, in annotations, einsums and docstrings alike:

  B batch            T queries, or positions of a sequence
  S keys             C slots of a cache
  N query heads      K key and value heads, a divisor of N
  G heads a group    H head size
  D model width      F neurons of an MLP
  V vocabulary       L layers

A module that needs more says so in its docstring.
"""

from kernels_pallas.version import attribute as __getattr__  # __version__.
