"""One attention layer: Scan & Snap (https://arxiv.org/abs/2305.16380).

Modules, from the theory to the experiment:

  config      every hyperparameter, and the settings of the paper's figures
  data        sequence classes P(l | m, n), token counts and token sequences
  model       the layer, reparametrised (Y, Z) and original (U, W_Q, W_K, W_V)
  dynamics    lemmas and theorems as functions: attention and what moves it
  growth      how fast the decoder learns; gains: what a token gains over others
  flow        gradient flow, integrated
  theorems    every statement measured against its bound
  metrics     what is read off attention: c_n, entropies, recall
  run         one run: initial values, updates, what is observed
  ensemble    many runs at once: vmap inside a device, pmap across devices
  train       train_and_evaluate, the training loop
  published   numbers that the paper and its code report
  experiment  what every experiment needs, see there

Letters, in shapes and in the sentences about them:

  B batch           D embedding width      G devices, H members of each
  K classes         L most tokens that a class draws
  M tokens          N steps                R runs (seeds x rates)
  S evaluations, times, points of a curve  T sequence length

`dynamics` introduces the symbols of the paper's formulas.
"""

from scansnap_jax.version import attribute as __getattr__  # __version__.
