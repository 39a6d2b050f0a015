"""Joint dynamics of MLP and attention, JoMA (https://arxiv.org/abs/2310.00535).

Rooms, from the theory to the experiments:

  theory        the block's equations, their trajectories, Theorems 1 to 5
  block         the block in Linen, alone and stacked: data, model, training
  hierarchy     Table 1: a Transformer on a hierarchy of latents
  studies       one file a figure, theorem or open question
  transformer   the Transformer on real text and checkpoints
  systems       attention systems and cache policies, one file each
  inference     continuations of prompts, their cost, and what may be left out
"""

from scansnap_jax.version import attribute as __getattr__  # __version__.
