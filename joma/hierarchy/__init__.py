"""Table 1 of JoMA: do hidden nodes find the latents of a hierarchy?

`config`, `data` (combinations of combinations), `model`, `run` (one run),
`train` (the loop over all of them) and `scores`.

Letters, in shapes and in the sentences about them:

  B sequences    D width          E evaluations     F hidden nodes
  I steps        K classes (C in the paper and in the names of cells)
  M tokens       N latents of a level               P latents in a set
  Q unseen combinations           R runs (seeds)    S key positions
  T sequence length, query positions                W permutations
"""
