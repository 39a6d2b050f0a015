"""Joint dynamics of MLP and attention, JoMA (https://arxiv.org/abs/2310.00535).

Public modules so far: dynamics, flow (gradient flow), invariants (Theorem 1),
winner (Theorem 2), isotropic (Theorem 3), convergence (Theorem 4), metrics.
"""
