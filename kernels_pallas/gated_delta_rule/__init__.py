"""The gated delta rule: a state that forgets, and corrects what it recalls.

Public modules: api (gated_delta_rule, step), reference, xla, pallas_tpu,
pallas_gpu, output, cost, shapes; algebra (of one chunk).

Letters: B batch, T positions, N value heads, K query and key heads, a divisor
of N, H key size, J value size, C positions of a chunk, D channels of a decay: 1
(one decay a head) or H (one a key channel).
"""
