"""The laws of JoMA (https://arxiv.org/abs/2310.00535) as functions.

`dynamics` is one block's gradient flow and `flow` integrates it; `invariants`,
`winner`, `isotropic`, `convergence` and `cooccurrence` are Theorems 1 to 5;
`data` draws contexts and latent trees, `metrics` reads runs, and `published`
holds the authors' numbers.
"""
