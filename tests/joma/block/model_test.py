import functools

from absl.testing import absltest
from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.block import model
from joma.theory import dynamics
from tests import draws
from tests.joma import problems

# Ten roundings of numbers near 1 in float32.
_ATOL = 1e-6
_COUNTS = jnp.array([[1.0, 0, 2], [3, 1, 0], [0, 0, 0], [2, 2, 1]])
_QUERY = jnp.array([0, 1, 1, 0])


def _block(**changes):
  options = dict(num_tokens=3, hidden_dim=4, num_queries=2, w_scale=1.0)
  return model.JomaBlock(**options | dict(z_scale=1.0) | changes)


def _apply(block, counts=_COUNTS, seed=0):
  variables = block.init(jax.random.key(seed), counts, _QUERY)
  hidden, sown = block.apply(
      variables, counts, _QUERY, mutable=["intermediates"]
  )
  return variables, hidden, sown["intermediates"]


class JomaBlockTest(parameterized.TestCase):

  @parameterized.product(
      attention=("linear", "exp", "softmax"), has_residual=(True, False)
  )
  def test_equals_the_equations_sample_by_sample(self, attention, has_residual):
    kind = dynamics.Block(
        attention=attention,
        activation="silu",
        temperature=0.7,
        has_residual=has_residual,
    )
    variables, hidden, sown = _apply(_block(kind=kind, embedding="orthonormal"))
    params, table = variables["params"], np.asarray(variables["constants"]["U"])
    np.testing.assert_allclose(table @ table.T, np.eye(5), atol=_ATOL)
    for i, (x, q) in enumerate(zip(np.asarray(_COUNTS), _QUERY, strict=True)):
      z = np.asarray(params["Z"])[q] / 0.7
      b = z * x if attention == "linear" else np.exp(z) * x
      if attention == "softmax":
        b = b / max(b.sum(), 1e-30)
      f = table[:3].T @ b + has_residual * table[3 + int(q)]
      pre = np.asarray(params["W"]).T @ f
      expected = dict(
          attn_logits=z,
          attn_weights=b,
          features=f,
          hidden_pre=pre,
          hidden=pre / (1 + np.exp(-pre)),
      )
      for name, value in expected.items():
        np.testing.assert_allclose(sown[name][0][i], value, atol=10 * _ATOL)
    chex.assert_trees_all_equal(hidden, sown["hidden"][0])

  @parameterized.parameters("identity", "orthonormal", "trained")
  @pytest.mark.by_default(0, 1)
  def test_is_the_block_of_the_theory(self, embedding):
    block = _block(embedding=embedding, embed_dim=6)
    variables, hidden, _ = _apply(block)
    params, batch = model.to_dynamics(block, variables, _COUNTS, _QUERY)
    chex.assert_trees_all_close(
        problems.hidden(params, batch, block.kind), hidden, atol=_ATOL
    )
    gram = batch.embedding.T @ batch.embedding
    chex.assert_trees_all_close(gram, jnp.eye(3), atol=_ATOL)
    self.assertEqual("U" in variables["params"], embedding == "trained")

  @pytest.mark.slow
  def test_any_activation(self):
    named, given = (
        _apply(_block(kind=dynamics.Block(activation=activation)))[1]
        for activation in ("relu", lambda h: (h + jnp.abs(h)) / 2)
    )
    chex.assert_trees_all_close(named, given, atol=_ATOL)

  @pytest.mark.slow
  def test_an_empty_context_has_finite_gradients(self):
    block = _block()
    variables, _, _ = _apply(block)
    total = lambda params: block.apply(
        {"params": params}, 0 * _COUNTS, _QUERY
    ).sum()
    chex.assert_tree_all_finite(jax.grad(total)(variables["params"]))

  def test_narrow_embeddings_must_be_trained(self):
    with self.assertRaisesRegex(ValueError, "5 orthonormal embeddings need"):
      _apply(_block(embed_dim=4))
    variables, _, _ = _apply(_block(embed_dim=4, embedding="trained"))
    chex.assert_shape(variables["params"]["U"], (5, 4))

  def test_wrong_number_of_tokens(self):
    with self.assertRaisesRegex(ValueError, "num_tokens=3 got counts of 2"):
      _apply(_block(), counts=_COUNTS[:, :2])


class JomaStackTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_hidden_nodes_are_the_next_tokens(self):
    blocks = (_block(), _block(num_tokens=4, hidden_dim=2))
    variables, hidden, sown = _apply(model.JomaStack(blocks))
    params = variables["params"]
    first = blocks[0].apply({"params": params["blocks_0"]}, _COUNTS, _QUERY)
    second = blocks[1].apply({"params": params["blocks_1"]}, first, _QUERY)
    chex.assert_trees_all_close(hidden, second, atol=_ATOL)
    chex.assert_trees_all_equal(sown["blocks_0"]["hidden"][0], first)

  def test_blocks_must_fit(self):
    with self.assertRaisesRegex(ValueError, "num_tokens=3 got counts of 4"):
      _apply(model.JomaStack((_block(), _block())))


class TrainingTest(parameterized.TestCase):
  """Theorem 1 on a module that trains together with a layer above it."""

  @pytest.mark.slow
  def test_invariant_holds_in_a_real_run(self):
    kind = dynamics.Block(attention="exp", activation="gelu")
    block = _block(kind=kind, embedding="orthonormal", z_scale=0.1)
    variables, _, _ = _apply(block)
    label = jnp.array([0, 1, 2, 3])

    def loss(params):
      variables_now = {**variables, "params": params}
      logits = block.apply(variables_now, _COUNTS, _QUERY) @ upper
      return -jnp.diagonal(jax.nn.log_softmax(logits)[:, label]).mean()

    upper = draws.normal(3, 4, 4)
    checks = [
        _train(block, variables, loss, step_size) for step_size in (0.02, 0.01)
    ]
    self.assertLess(checks[1].relative_error[-1], 0.02)
    self.assertGreater(checks[1].correlation[-1], 0.999)
    ratio = checks[0].relative_error[-1] / checks[1].relative_error[-1]
    # First order in the step, but for the second and float32.
    self.assertBetween(float(ratio), 1.8, 2.2)


def _train(block, variables, loss, step_size):
  """Trains for one unit of time; checks the law at start and end."""

  @functools.partial(jax.jit, static_argnums=1)
  def train(params, num_steps):
    descend = lambda x, g: x - step_size * g
    step = lambda _, p: jax.tree.map(descend, p, jax.grad(loss)(p))
    return jax.lax.fori_loop(0, num_steps, step, params)

  ends = [variables["params"]]
  ends.append(train(ends[0], round(1 / step_size)))
  states = []
  for params in ends:
    now = {**variables, "params": params}
    states.append(
        problems.reduce(*model.to_dynamics(block, now, _COUNTS, _QUERY))
    )
  path = jax.tree.map(lambda *x: jnp.stack(x), *states)
  return problems.check_invariant(path.attn_logits, path.v, attention="exp")


if __name__ == "__main__":
  absltest.main()
