import functools

from absl.testing import parameterized
import chex
from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from joma.transformer import config as configs
from joma.transformer import model as models
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied

# Ten times the largest float32 error seen, logits being of order 1.
_TOLERANCE = 2e-5
_SMALL = dict(
    vocab_size=50,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=24,
    max_len=12,
)
_KINDS = dict(
    llama=dict(),
    sandwich=dict(norm_placement="sandwich", windows=(0, 3), use_qk_norm=True),
    parallel=dict(use_parallel_residual=True, rotary_fraction=0.25),
    post=dict(norm_placement="post", use_final_norm=False, positions="learned"),
    encoder=dict(positions="sinusoidal", tie_embeddings=False),
)


def _model(dtype=jnp.float32, remat="none", **changes):
  config = configs.TransformerConfig(**_SMALL | changes)
  # Plain attention: a program to compile less.
  return models.Transformer(config, dtype, "reference", remat)


def _tokens(seq_len=9):
  return jax.random.randint(jax.random.key(0), (2, seq_len), 0, 50)


@functools.cache
def _params(model):
  return applied.params(model, 1)


@functools.partial(jax.jit, static_argnames=("model", "mutable"))
def _apply(model, params, tokens, mutable=False, **options):
  return model.apply({"params": params}, tokens, mutable=mutable, **options)


class TransformerTest(parameterized.TestCase):

  @parameterized.parameters(*_KINDS)
  @pytest.mark.by_default(2)
  def test_a_token_changes_no_logits_before_it(self, kind):
    model = _model(**_KINDS[kind])
    params, tokens = _params(model), _tokens()
    changed = tokens.at[0, 5].add(1)
    one, two = (_apply(model, params, x) for x in (tokens, changed))
    chex.assert_trees_all_close(one[:, :5], two[:, :5], atol=1e-6)
    self.assertGreater(float(jnp.abs(one - two)[0, 5].max()), 1e-3)
    self.assertGreater(float(jnp.abs(one - two)[0, 6].max()), 1e-5)

  @pytest.mark.slow
  def test_remat_changes_neither_value_nor_gradient(self):
    plain, remat = (
        _model(remat=use, dropout=0.5, **_KINDS["sandwich"])
        for use in ("none", "full")
    )
    params, tokens = _params(plain), _tokens()

    def loss(params, model):
      logits = model.apply(
          {"params": params},
          tokens,
          is_training=True,
          rngs={"dropout": jax.random.key(3)},
      )
      return jnp.square(logits).mean()

    grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    want, got = grad(params, plain), grad(params, remat)
    chex.assert_trees_all_close(got, want, atol=_TOLERANCE)
    text = str(jax.make_jaxpr(loss, static_argnums=1)(params, remat))
    self.assertIn("remat", text)

  def test_the_residual_stream_adds_up(self):
    model = _model(**_KINDS["llama"])
    params, tokens = _params(model), _tokens()
    _, sown = _apply(model, params, tokens, mutable="intermediates")
    layer = sown["intermediates"]["layers_1"]
    (hidden,) = layer["mlp"]["hidden"]
    update = hidden @ params["layers_1"]["mlp"]["down"]["kernel"]
    (resid_attn,), (resid_mlp,) = layer["resid_attn"], layer["resid_mlp"]
    chex.assert_trees_all_close(resid_mlp, resid_attn + update, atol=_TOLERANCE)

  def test_parallel_residual_reads_one_stream_twice(self):
    model = _model(**_KINDS["parallel"])
    params, tokens = _params(model), _tokens()
    _, sown = _apply(model, params, tokens, mutable="intermediates")
    layer = sown["intermediates"]["layers_1"]
    (stream,) = sown["intermediates"]["layers_0"]["resid_mlp"]
    normed = models.make_norm(model.config, jnp.float32, "norm").apply(
        {"params": params["layers_1"]["mlp_norm"]}, stream
    )
    want = normed @ params["layers_1"]["mlp"]["gate"]["kernel"]
    (got,) = layer["mlp"]["hidden_pre"]
    chex.assert_trees_all_close(got, want, atol=_TOLERANCE)

  def test_logits_of_one_token_are_those_of_all(self):
    model = _model()
    params, tokens = _params(model), _tokens()
    every = _apply(model, params, tokens)
    at = jnp.array([3, 8])
    some = _apply(model, params, tokens, logits_at=at)
    want = jnp.stack([every[0, 3:4], every[1, 8:9]])
    chex.assert_trees_all_close(some, want, atol=_TOLERANCE)

  @pytest.mark.slow
  def test_implementations_agree(self):
    model = _model(**_KINDS["sandwich"])
    params = _params(model)
    want = _apply(model, params, _tokens())
    got = _apply(model.clone(implementation="xla"), params, _tokens())
    chex.assert_trees_all_close(got, want, atol=_TOLERANCE)

  @pytest.mark.slow
  def test_positions_shift_what_is_learned_and_not_what_is_rotary(self):
    tokens = _tokens(4)
    shifted = jnp.broadcast_to(jnp.arange(4)[None] + 5, tokens.shape)
    for positions, changes in (("rotary", False), ("learned", True)):
      model = _model(positions=positions)
      params = _params(model)
      gap = _apply(model, params, tokens) - _apply(
          model, params, tokens, positions=shifted
      )
      self.assertEqual(float(jnp.abs(gap).max()) > 1e-2, changes, positions)

  def test_bfloat16_keeps_parameters_and_logits_float32(self):
    model = _model(jnp.bfloat16)
    params = _params(model)
    self.assertEqual(
        {x.dtype for x in jax.tree.leaves(params)}, {jnp.dtype(jnp.float32)}
    )
    logits = _apply(model, params, _tokens())
    chex.assert_type(logits, jnp.float32)
    want = _apply(_model(), params, _tokens())
    # Two layers of bfloat16, whose numbers have 8 bits, on logits of order 1.
    chex.assert_trees_all_close(logits, want, atol=0.1)
    self.assertGreater(float(jnp.abs(logits - want).max()), 1e-4)

  def test_learned_positions_end(self):
    model = _model(positions="learned")
    with self.assertRaisesRegex(errors.UserError, "has 12 learned positions"):
      model.init(jax.random.key(0), _tokens(13))

  @pytest.mark.slow
  def test_embeddings_may_be_narrower_than_the_stream(self):
    model = _model(embed_proj_dim=8)
    shapes = jax.tree.map(jnp.shape, _params(model))
    self.assertEqual(shapes["token_embed"]["embedding"], (50, 8))
    self.assertEqual(shapes["embed_proj"]["kernel"], (8, 16))
    self.assertEqual(shapes["output_proj"]["kernel"], (16, 8))

  @pytest.mark.slow
  def test_is_an_nnx_module_through_flax_s_bridge(self):
    model, tokens = _model(), _tokens()
    bridged = nnx.bridge.ToNNX(model, nnx.Rngs(0)).lazy_init(tokens)
    state = nnx.state(bridged, nnx.Param)
    params = _params(model)
    nnx.replace_by_pure_dict(state, params)
    nnx.update(bridged, state)
    want = model.apply({"params": params}, tokens)
    chex.assert_trees_all_equal(bridged(tokens), want)
    square = lambda logits: jnp.sum(logits**2)
    grads = nnx.grad(lambda module: square(module(tokens)))(bridged)
    want = jax.grad(lambda p: square(model.apply({"params": p}, tokens)))(
        params
    )
    chex.assert_trees_all_close(nnx.to_pure_dict(grads), want, rtol=1e-5)
