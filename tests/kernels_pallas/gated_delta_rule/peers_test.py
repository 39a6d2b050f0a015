"""Beside transformers' torch functions, where the extra bench is installed."""

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gated_delta_rule import api
from kernels_pallas.gated_delta_rule import shapes
from tests.kernels_pallas.gated_delta_rule import oracle

torch = pytest.importorskip("torch", reason="needs the extra bench")
qwen3_next = pytest.importorskip(
    "transformers.models.qwen3_next.modeling_qwen3_next",
    reason="needs the extra bench",
)

_SHAPE = shapes.Shape(
    batch=2,
    length=100,
    num_heads=2,
    num_key_heads=2,
    key_size=32,
    value_size=16,
)


class TransformersTest(parameterized.TestCase):

  @parameterized.parameters(
      "torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"
  )
  def test_equals(self, name):
    case = oracle.draw(_SHAPE, "float32")
    arguments = case.arguments()
    # Its chunks take differences of sums of logarithms, of which decays of 1e-6
    # would leave few digits.
    log_decay = jnp.maximum(arguments["log_decay"], -1.5)
    arguments["log_decay"] = log_decay
    found = api.gated_delta_rule(**arguments)
    tensors = {
        name: torch.tensor(np.asarray(x)) for name, x in arguments.items()
    }
    out, state = getattr(qwen3_next, name)(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        g=tensors["log_decay"],
        beta=tensors["beta"],
        initial_state=tensors["initial_state"],
        output_final_state=True,
    )
    for x, y in ((out, found.out), (state, found.state)):
      x = x.numpy()
      largest = np.abs(x).max()
      np.testing.assert_allclose(y, x, atol=1e-5 * largest, rtol=0)


if __name__ == "__main__":
  absltest.main()
