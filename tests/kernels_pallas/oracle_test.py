from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from kernels_pallas.attention import shapes
from tests.kernels_pallas import conformance
from tests.kernels_pallas import oracle

_RNG = np.random.default_rng(0)
_ALL = conformance.Options(
    soft_cap=3.0, scale=0.3, has_sinks=True, has_row_weights=True
)


class OracleTest(parameterized.TestCase):
  """The oracle itself, on what can be computed by hand."""

  def test_two_keys(self):
    # Logits 0 and log 3: weights 1/4 and 3/4; lse = log 4.
    one = np.ones((1, 1, 1, 1))
    key = np.array([0.0, np.log(3.0)]).reshape(1, 2, 1, 1)
    value = np.array([4.0, 8.0]).reshape(1, 2, 1, 1)
    case = oracle.Case(one, key, value, np.ones((1, 1, 1, 2), bool), 1.0)
    got = oracle.attention(case)
    np.testing.assert_allclose(got.out, 7.0)
    np.testing.assert_allclose(got.lse, np.log(4.0))
    np.testing.assert_allclose(got.col_mass[0, 0], [0.25, 0.75])

  def test_gradients_are_those_of_finite_differences(self):
    shape = shapes.Shape(
        num_queries=3, num_keys=5, num_heads=2, num_kv_heads=1, head_dim=2
    )
    allowed = _RNG.random((1, 2, 3, 5)) < 0.7
    inputs = conformance.draw(shape, "float32", allowed, _ALL)
    d_out, d_lse = np.asarray(inputs.d_out), np.asarray(inputs.d_lse)
    found = oracle.gradients(inputs.case, d_out, d_lse)

    def loss(**changed):
      fields = {**vars(inputs.case), **changed}
      result = oracle.attention(oracle.Case(**fields))
      return (result.out * d_out).sum() + (result.lse * d_lse).sum()

    for name, gradient in found.items():
      value = getattr(inputs.case, name)
      step = 1e-6 * _RNG.standard_normal(value.shape)
      slope = (loss(**{name: value + step}) - loss(**{name: value - step})) / 2
      np.testing.assert_allclose(slope, (gradient * step).sum(), rtol=1e-6)


if __name__ == "__main__":
  absltest.main()
