"""Joint dynamics of MLP and attention, JoMA (https://arxiv.org/abs/2310.00535).

Modules, from the theory to the experiment:

  config            settings of the studies of theorems and figures;
                    question_config, table1_config: of the others
  data              class contexts and hierarchical latent trees
  model             the block in Linen, alone and stacked
  dynamics, flow    the block's equations and their trajectories
  invariants, winner, isotropic, convergence, cooccurrence
                    Theorems 1 to 5
  metrics           entropy, stable rank, agreement of two vectors
  block_train       training of blocks; block_data, block_ensemble, summaries
  hierarchy         data of Table 1; hierarchy_model, hierarchy_train,
                    hierarchy_scores
  train             train_and_evaluate, the training loop of Table 1
  published         numbers that the paper's code fixes
  studies           one file a figure, theorem or open question
  transformer       the Transformer on real text and checkpoints
  inference         continuations of prompts
"""
