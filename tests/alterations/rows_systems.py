"""Faults in `joma.systems`: routers and mixers."""

TABLE = """
joma/systems/routers/gated_attention.py
- gates = jax.nn.sigmoid(opening.astype(jnp.float32))
+ gates = 2 * jax.nn.sigmoid(opening.astype(jnp.float32))
? half-open gates let everything through
@ test_weights_of_zero_are_half_of_plain_attention

joma/systems/routers/gated_attention.py
- opening = jnp.einsum("BTD,DNH->BTNH", call.x, kernel)
+ opening = jnp.einsum("BTD,DNH->BTNH", call.x, kernel[..., :1])
? the outputs of a head share one gate
@ test_a_gate_is_a_sigmoid_of_the_input
"""
