import re

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

from joma.transformer import config as configs
from joma.transformer import mlp
from joma.transformer.layers import products
from tests import draws

_LAST = (((2,), (0,)), ((), ()))


class DotGeneralTest(absltest.TestCase):

  def test_is_the_product_and_so_are_its_gradients(self):
    x, kernel = draws.normal(0, 2, 3, 4), draws.normal(1, 4, 2, 5)
    weights = draws.normal(2, 2, 3, 2, 5)
    loss = lambda x, kernel: (
        products.dot_general(x, kernel, _LAST) * weights
    ).sum()
    by_x, by_kernel = jax.grad(loss, (0, 1))(x, kernel)
    wide = [np.float64(a) for a in (x, kernel, weights)]
    x, kernel, weights = wide
    np.testing.assert_allclose(
        products.dot_general(*map(jnp.float32, (x, kernel)), _LAST),
        np.einsum("btd,dnh->btnh", x, kernel),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        by_x, np.einsum("btnh,dnh->btd", weights, kernel), atol=1e-5
    )
    np.testing.assert_allclose(
        by_kernel, np.einsum("btd,btnh->dnh", x, weights), atol=1e-5
    )

  def test_several_axes_are_contracted(self):
    x, kernel = draws.normal(0, 2, 3, 4, 5), draws.normal(1, 4, 5, 6)
    got = products.dot_general(x, kernel, (((2, 3), (0, 1)), ((), ())))
    want = np.einsum("btnh,nhd->btd", np.float64(x), np.float64(kernel))
    np.testing.assert_allclose(got, want, atol=1e-5)

  def test_other_axes_are_handed_on(self):
    x, kernel = draws.normal(0, 3, 2), draws.normal(1, 3, 5)
    got = products.dot_general(x, kernel, (((0,), (0,)), ((), ())))
    np.testing.assert_allclose(got, x.T @ kernel, atol=1e-6)

  def test_forward_mode_goes_through(self):
    x, kernel = draws.normal(0, 2, 3, 4), draws.normal(1, 4, 5)
    f = lambda kernel: products.dot_general(x, kernel, _LAST)
    _, slope = jax.jvp(f, (kernel,), (kernel,))
    np.testing.assert_allclose(slope, f(kernel), atol=1e-6)

  def test_no_gradient_of_an_mlp_turns_its_hidden_units(self):
    config = configs.TransformerConfig(embed_dim=16, hidden_dim=64)
    module, x = mlp.Mlp(config), draws.normal(0, 4, 8, 16)
    params = module.init(jax.random.key(0), x)
    step = jax.jit(jax.grad(lambda p: module.apply(p, x).sum()))
    text = step.lower(params).compile().as_text()
    # [F, B T] is the hidden layer turned: 64 x 32.
    self.assertEqual(re.findall(r"= f32\[64,32\]\{1,0\} \w+", text), [])


if __name__ == "__main__":
  absltest.main()
