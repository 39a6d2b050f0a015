"""Names of `activations`; apart from them, for configs that import no jax."""

from typing import Literal

Activation = Literal[
    "relu", "gelu", "gelu_tanh", "silu", "identity", "quadratic"
]
