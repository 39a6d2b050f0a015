"""JoMA's block and a linear read-out, in training.

  model      the block as a module, and stacks of it
  data       tasks: contexts, sequences, clouds, latent trees
  run        one run: settings, start, batches; loss: what it descends on
  train      its steps and records; observe: what a record holds
  ensemble   many runs at once; tree_runs: two blocks on latent trees

Letters, here and in shapes:

  B samples      D width           E rows of U      F hidden nodes
  H depths of a tree
  K classes      L layers          M tokens         N steps
  P latents      Q queries         R runs           S records
  T sequence length, and in formulas the temperature of attention
"""
