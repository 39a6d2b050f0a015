"""Joint dynamics of MLP and attention, JoMA (https://arxiv.org/abs/2310.00535).

Laws as functions: dynamics (the block and its flow), flow (trajectories),
invariants (Theorem 1), winner (Theorem 2), isotropic (Theorem 3), convergence
(Theorem 4), cooccurrence (Theorem 5), metrics. What they are held against:
data, model (Linen), published. Settings are in config, figures' numbers in
studies.
"""
