"""The laws of JoMA (https://arxiv.org/abs/2310.00535) as functions.

`dynamics` is one block's gradient flow and `flow` integrates it; `invariants`,
`winner`, `isotropic`, `convergence` and `cooccurrence` are Theorems 1 to 5;
`data` draws contexts and latent trees, `metrics` reads runs, and `published`
holds the authors' numbers.

Letters, in shapes and in the sentences about them:

  B samples       D width          E entries of a vector   F hidden nodes
  H depth of the lowest common ancestor                    J components, clouds
  K classes       L depths of a tree (L_j, with an index, is ln(1 / delta_j))
  M tokens, leaves                 N nodes of a depth      P latents
  Q queries       R runs           S times                 W sequence length
  T temperature

`dynamics` introduces the symbols of the formulas.
"""
