"""What the theory's sparsity buys at inference.

generate, sampling      prompts to continuations: prefill, then decode steps
compression             a policy on the arrays of any model
kv_cache                a cache of a fixed number of slots
policy                  which tokens stay; the policies themselves are in
                        joma/systems/cache_policies, one file each
speculative             guesses of tokens that one pass verifies
serving                 texts that join and leave a batch between its steps
contextual_sparsity     which heads and neurons a token needs: capture,
                        predictors, sparse_mlp, sparse_heads, training_free
cost_model, chips       bytes, operations and least time of a step
tasks, evaluate         what it costs: texts whose needed tokens are known
bridge                  heavy hitters that the theory predicts
"""
