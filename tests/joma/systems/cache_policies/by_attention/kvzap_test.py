import math

from absl.testing import absltest
from absl.testing import parameterized
from flax import linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference import compression
from joma.inference.cache import kv_cache
from joma.systems.cache_policies import names
from joma.systems.cache_policies.by_attention import kvzap
from joma.transformer import config as configs
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from tests.joma.systems.cache_policies import plain
from tests.joma.transformer import applied


def drawn(width, num_kv_heads, num_layers=1, size=3):
  """Networks of numbers of order 1."""
  draws = np.random.default_rng(width)
  normal = lambda *shape: draws.standard_normal(shape, np.float32)
  return kvzap.Network(
      inner=normal(num_layers, width, size) / np.float32(width**0.5),
      inner_bias=normal(num_layers, size),
      outer=normal(num_layers, size, num_kv_heads),
      outer_bias=normal(num_layers, num_kv_heads) - 2,
  )


class Plain(plain.Plain):
  """One layer's network in loops; inputs are the values of all heads."""

  networks = None

  def _score(self, x, head):
    net = self.networks
    found = float(net.outer_bias[0, head])
    for r in range(net.inner.shape[2]):
      a = float(net.inner_bias[0, r]) + float(net.inner[0, :, r] @ x)
      # The tanh form of gelu.
      inside = math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)
      found += 0.5 * a * (1 + math.tanh(inside)) * float(net.outer[0, r, head])
    return math.exp(found)

  def score_prompt(self, tokens, seen):
    for token in tokens:
      token["score"] = self._score(self.inputs[token["pos"]], seen.head)

  def enter(self, token, head, position):
    token["score"] = self._score(self.inputs[position], head)


class KVzapTest(parameterized.TestCase):

  def _check(self, *heads, **options):
    num_kv_heads = heads[1] if heads else 2
    networks = drawn(8 * num_kv_heads, num_kv_heads)
    path = self.create_tempfile().full_path
    kvzap.save(path, networks)
    rule = type("Drawn", (Plain,), {"networks": networks})
    plain.check(rule, kvzap.KVzap(weights=path), *heads, **options)

  def test_keeps_what_plain_python_keeps_at_every_step(self):
    self._check()

  @parameterized.parameters((4, 1), (4, 2), (3, 3))
  @pytest.mark.slow
  def test_over_512_steps_grouped_or_not(self, *heads):
    self._check(*heads, num_steps=512)

  def test_wrong_files_are_one_sentence(self):
    wrong = self.create_tempfile(content="no arrays").full_path
    for weights, message in (
        ("", "kvzap needs the networks of its model"),
        ("/nowhere.npz", "weights=/nowhere.npz holds no networks of kvzap"),
        (wrong, "holds no networks of kvzap"),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        kvzap.load(weights)


class ModelTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.config = configs.TransformerConfig(
        vocab_size=12,
        num_layers=2,
        embed_dim=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        hidden_dim=8,
        max_len=32,
    )
    self.networks = drawn(8, 1, num_layers=2)
    self.path = self.create_tempfile().full_path
    kvzap.save(self.path, self.networks)

  def _read(self, weights, name="kvzap"):
    """Caches after 9 tokens, and the intermediates of the same."""
    model = models.Transformer(self.config, implementation="reference")
    variables = {"params": applied.params(model)}
    tokens = jnp.arange(9)[None]
    policy = names.parse(f"{name}:weights={weights}")
    caches = kv_cache.init(policy, self.config, 1, 4)
    _, caches = model.apply(variables, tokens, kv_cache=caches)
    _, seen = model.apply(variables, tokens, mutable="intermediates")
    return caches, seen["intermediates"], variables["params"]

  def test_layers_hand_on_what_attention_reads(self):
    """Scores are of each layer's own network and normalized input."""
    caches, _, _ = self._read(self.path)
    model = models.Transformer(self.config, implementation="reference")
    params = applied.params(model)
    seen = []

    def note(next_fun, args, kwargs, context):
      if (type(context.module).__name__, context.method_name) == (
          "Attention",
          "__call__",
      ):
        seen.append(np.asarray(args[0]))
      return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
      model.apply({"params": params}, jnp.arange(9)[None])
    for layer, cache in enumerate(caches):
      network = kvzap.Network(*(p[layer] for p in self.networks))
      want = np.exp(kvzap.log_scores(network, jnp.asarray(seen[layer][0])))[
          :, 0
      ]
      best = np.sort(np.argsort(-want)[:4])
      np.testing.assert_array_equal(np.sort(cache.pos[0, 0]), best)
      np.testing.assert_allclose(
          np.sort(cache.score[0, 0]), np.sort(want[best]), rtol=1e-5
      )

  def test_networks_of_another_model_are_refused(self):
    kvzap.save(self.path, drawn(6, 1, num_layers=2))
    with self.assertRaisesRegex(errors.UserError, "2 layers of width 6 with 1"):
      self._read(self.path)
    kvzap.save(self.path, drawn(8, 1))
    with self.assertRaisesRegex(errors.UserError, "layer 1 here is of width 8"):
      self._read(self.path)

  def test_keys_and_values_alone_are_refused(self):
    arrays = (jnp.zeros((1, 6, 1, 4)),) * 2
    with self.assertRaisesRegex(errors.UserError, "reads a layer's input"):
      compression.compress(
          *arrays,
          None,
          jnp.array([6]),
          policy=f"kvzap:weights={self.path}",
          capacity=3,
      )


if __name__ == "__main__":
  absltest.main()
