"""Monarch matrices: the product, the projection, and models made of them."""

import dataclasses
import itertools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from joma.inference.cost import model_size
from joma.inference.sparsity import contextual_sparsity
from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer import probes
from joma.transformer import sharding
from joma.transformer.hf import config_json
from joma.transformer.hf import pretrained
from joma.transformer.layers import monarch
from joma.transformer.layers import projections
from joma.transformer.training import init as init_lib
from joma.transformer.training import lm_config
from joma.transformer.training import run as runs
from kernels_pallas.aot import compile as compile_lib
from kernels_pallas.aot import topology
from scansnap_jax.experiment import errors
from tests.joma.transformer import applied
from tests.joma.transformer.training.devices import eight_devices

_DENSE = configs.TransformerConfig(
    vocab_size=31,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    hidden_dim=24,
    use_qkv_bias=True,
    use_mlp_bias=True,
    use_attn_out_bias=True,
)
_CONFIG = dataclasses.replace(_DENSE, projection="monarch:blocks=2:rank=3")
_SIZES = projections.Monarch(blocks=3, rank=2)
_TOKENS = np.arange(12)[None] % 31


def _factors(seed=0, num_in=12, num_out=15, sizes=_SIZES):
  draw = np.random.default_rng(seed)
  b, r = sizes.blocks, sizes.rank
  right = draw.normal(size=(b, num_in // b, b, r))
  left = draw.normal(size=(b, b, r, num_out // b))
  return right.astype(np.float32), left.astype(np.float32)


def _model(config=_CONFIG, **options):
  return models.Transformer(config, implementation="reference", **options)


class MatrixTest(parameterized.TestCase):

  def test_the_product_is_two_block_diagonals_and_a_permutation(self):
    """P L P^T R of the paper, written out with matrices that are mostly 0."""
    right, left = _factors()
    b, inner, rank, outer = 3, 4, 2, 5
    first = np.zeros((b * b * rank, b * inner))
    for a, p, j, r in itertools.product(*map(range, right.shape)):
      first[(a * b + j) * rank + r, a * inner + p] = right[a, p, j, r]
    swap = np.zeros((b * b * rank, b * b * rank))
    for a, j, r in itertools.product(range(b), range(b), range(rank)):
      swap[(j * b + a) * rank + r, (a * b + j) * rank + r] = 1
    second = np.zeros((b * outer, b * b * rank))
    for j, a, r, s in itertools.product(*map(range, left.shape)):
      second[j * outer + s, (j * b + a) * rank + r] = left[j, a, r, s]
    last = np.zeros((b * outer, b * outer))
    for j, s in itertools.product(range(b), range(outer)):
      last[s * b + j, j * outer + s] = 1
    whole = last @ second @ swap @ first
    np.testing.assert_allclose(
        monarch.matrix_of(right, left), whole.T, atol=1e-5
    )
    x = np.random.default_rng(1).normal(size=(2, 7, 12)).astype(np.float32)
    np.testing.assert_allclose(
        monarch.product(*map(jnp.asarray, (x, right, left))),
        x @ whole.T,
        atol=1e-4,
    )
    self.assertEqual(right.size + left.size, _SIZES.num_params(12, 15))

  def test_a_projection_leaves_out_the_last_singular_values(self):
    a = np.random.default_rng(2).normal(size=(12, 15))
    right, left, discarded = monarch.project(a, _SIZES)
    off = np.sum(np.square(a - _float64(right, left)))
    want = 0.0
    for block, j in itertools.product(range(3), range(3)):
      part = a[4 * block : 4 * block + 4, j::3]
      want += np.sum(np.linalg.svd(part, compute_uv=False)[2:] ** 2)
    np.testing.assert_allclose(off, want, rtol=1e-5)
    np.testing.assert_allclose(np.sum(discarded**2), want, rtol=1e-5)
    # Nothing near it is nearer.
    draw = np.random.default_rng(3)
    for _ in range(20):
      moved = _float64(
          right + 0.03 * draw.normal(size=right.shape),
          left + 0.03 * draw.normal(size=left.shape),
      )
      self.assertGreater(np.sum(np.square(a - moved)), off)

  def test_a_monarch_matrix_is_found_again(self):
    a = np.asarray(monarch.matrix_of(*_factors()))
    right, left, discarded = monarch.project(a, _SIZES)
    np.testing.assert_allclose(monarch.matrix_of(right, left), a, atol=1e-5)
    self.assertLess(np.abs(discarded).max(), 1e-5)
    # By other blocks it is none.
    other = projections.Monarch(blocks=1, rank=2)
    self.assertGreater(np.abs(monarch.project(a, other)[2]).max(), 0.1)

  def test_one_block_is_a_truncated_svd(self):
    a = np.random.default_rng(4).normal(size=(6, 5))
    right, left, _ = monarch.project(a, projections.Monarch(blocks=1, rank=2))
    u, s, v = np.linalg.svd(a)
    np.testing.assert_allclose(
        _float64(right, left), u[:, :2] * s[:2] @ v[:2], atol=1e-6
    )


def _float64(right, left):
  found = np.einsum("apjr,jars->apsj", right, left)
  return found.reshape(found.shape[0] * found.shape[1], -1)


class SettingsTest(parameterized.TestCase):

  @parameterized.parameters(
      ("butterfly", "must be dense, or monarch"),
      ("dense:rank=2", "must be dense, or monarch"),
      ("monarch:size=2", "size=2 is no option"),
      ("monarch:rank=0", "rank must be at least 1"),
      ("monarch:rank=1.5", "rank=1.5 is no option"),
      ("monarch:blocks=3", "blocks=3 must divide the 16 inputs of query"),
      ("monarch:blocks=4:rank=5", "rank=5 is more than a slice of query"),
      ("monarch:blocks=4:rank=3", "slice of key has: 16 x 8.* allow 2"),
  )
  def test_what_cannot_be_is_refused(self, text, message):
    with self.assertRaisesRegex(errors.UserError, message):
      dataclasses.replace(_DENSE, projection=text)

  def test_what_reads_whole_matrices_is_refused(self):
    said = "dense matrices, and this model has projection=monarch"
    with self.assertRaisesRegex(
        errors.UserError, f"group_penalty reads {said}"
    ):
      lm_config.LmConfig(model=_CONFIG, group_penalty=0.1, group_size=8)
    with self.assertRaisesRegex(errors.UserError, said):
      plan = contextual_sparsity.plan_lib.SparsityPlan()
      contextual_sparsity.check(_CONFIG, plan, True)
    with self.assertRaisesRegex(errors.UserError, said):
      monarch.project_model(_CONFIG, {}, "monarch")


class ModelTest(parameterized.TestCase):

  @pytest.mark.slow
  def test_a_projected_model_is_that_of_its_matrices(self):
    """Kernels in place of factors: the same logits, and not the old ones."""
    params = applied.params(_model(_DENSE))
    config, factors, off = monarch.project_model(
        _DENSE, params, _CONFIG.projection
    )
    self.assertEqual(config, _CONFIG)
    self.assertLen(off, 2 * 7)
    matrices = jax.tree.map(lambda x: x, factors)  # Its own dictionaries.
    for layer, part in itertools.product(range(2), ("attn", "mlp")):
      here = matrices[f"layers_{layer}"][part]
      for name, module in here.items():
        old = params[f"layers_{layer}"][part][name]["kernel"]
        kernel = monarch.kernel_of(module).reshape(old.shape)
        error = jnp.linalg.norm(kernel - old) / jnp.linalg.norm(old)
        want = off[f"layers_{layer}/{part}/{name}"]
        np.testing.assert_allclose(error, want, atol=1e-5)
        here[name] = {"kernel": kernel, "bias": module["bias"]}
    got = applied.logits(_model(), factors, _TOKENS)
    want = applied.logits(_model(_DENSE), matrices, _TOKENS)
    np.testing.assert_allclose(got, want, atol=1e-4)
    before = applied.logits(_model(_DENSE), params, _TOKENS)
    self.assertGreater(np.abs(got - before).max(), 0.1)
    for name, ranks in probes.stable_ranks(factors).items():
      np.testing.assert_allclose(
          ranks, probes.stable_ranks(matrices)[name], rtol=1e-4
      )

  @parameterized.parameters("all", "attn", "mlp")
  @pytest.mark.by_default(0)
  def test_parameters_are_counted_and_saved(self, part):
    text = f"{_CONFIG.projection}:part={part}"
    config = dataclasses.replace(_DENSE, projection=text)
    params = applied.params(_model(config))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    self.assertEqual(size, model_size.count(config).total)
    folder = self.create_tempdir().full_path
    pretrained.save(folder, config, params)
    again, loaded = pretrained.load(folder)
    self.assertEqual(again, config)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)

  def test_hugging_face_is_refused_by_name(self):
    message = "model_type=joma, the project's own form, can"
    with self.assertRaisesRegex(errors.UserError, message):
      config_json.to_hf(_CONFIG, "llama")
    run = lm_config.LmConfig(model=_CONFIG)
    with self.assertRaisesRegex(errors.UserError, f"{message}.*--save_own"):
      runs.check(run, None, True)

  def test_factors_are_split_by_rows_and_blocks(self):
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 1), sharding.AXES)
    spec = lambda path, shape: tuple(
        sharding.partition_spec(f"params/layers_0/{path}", shape, mesh)
    )
    self.assertEqual(
        spec("attn/query/left", (4, 4, 2, 8)), ("fsdp", None, None, "tensor")
    )
    self.assertEqual(spec("mlp/up/right", (4, 8, 4, 2)), (None, "fsdp"))
    self.assertEqual(spec("mlp/down/right", (4, 8, 4, 2)), ("tensor", "fsdp"))
    self.assertEqual(
        spec("attn/out/left", (4, 4, 2, 8)), (None, "tensor", None, "fsdp")
    )

  @pytest.mark.slow
  def test_eight_devices_compute_what_one_does(self):
    """Factors split over 2 x 2 x 2, loss and gradients; all, and MLPs alone."""
    texts = ("monarch:blocks=2:rank=2", "monarch:blocks=4:rank=1:part=mlp")
    found = eight_devices.differences([
        dict(projection=text, num_layers=2, use_qkv_bias=True) for text in texts
    ])
    self.assertLen(found, 2)
    self.assertLess(max(found), 1e-6)

  @pytest.mark.slow
  def test_first_values_have_the_variance_of_dense_ones(self):
    """Of wide matrices, so that means are sharp; both kinds of init."""
    wide = dict(embed_dim=64, num_heads=4, num_kv_heads=4, head_dim=16)
    for init, text in itertools.product(
        ("model", "pytorch"), ("dense", "monarch:blocks=4:rank=8")
    ):
      config = dataclasses.replace(
          _DENSE, num_layers=1, hidden_dim=128, projection=text, **wide
      )
      run = lm_config.LmConfig(model=config, init=init)
      params = init_lib.init_params(run, _model(config))["layers_0"]
      std = lambda part, name, params=params: float(
          np.std(monarch.kernel_of(params[part][name]))
      )
      # fan_in^-1/2, and in +-bound bound / sqrt(3).
      uniform = init == "pytorch"
      share = 3**-0.5 if uniform else 1
      want = (6 / (64 + 3 * 64)) ** 0.5 / 3**0.5 if uniform else 64**-0.5
      self.assertAlmostEqual(std("attn", "query") / want, 1, delta=0.08)
      self.assertAlmostEqual(
          std("mlp", "down") / (share * 128**-0.5), 1, delta=0.08
      )
      bias = np.abs(params["mlp"]["up"]["bias"])
      self.assertEqual(bias.max() > 0, uniform)
      self.assertEqual(np.abs(params["attn"]["query"]["bias"]).max(), 0)

  @pytest.mark.slow
  def test_layers_that_are_computed_anew_have_the_same_gradients(self):
    params = applied.params(_model())
    plain = applied.loss_and_grads(_model(), params, _TOKENS)
    for remat in ("full", "dots"):
      anew = applied.loss_and_grads(_model(remat=remat), params, _TOKENS)
      for one, other in zip(
          jax.tree.leaves(plain), jax.tree.leaves(anew), strict=True
      ):
        np.testing.assert_allclose(one, other, atol=1e-5)
        self.assertGreater(np.abs(one).max(), 0)


@absltest.skipUnless(topology.has_toolchain("tpu"), "libtpu is not installed")
class CompileTest(absltest.TestCase):

  @pytest.mark.slow
  def test_gradients_compile_for_v5e_with_the_bytes_of_factors(self):
    config = dataclasses.replace(
        _DENSE, embed_dim=256, num_heads=2, num_kv_heads=2, head_dim=128,
        hidden_dim=512, projection="monarch:blocks=16:rank=1",
    )  # fmt: skip
    model = models.Transformer(config, jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    params = jax.eval_shape(
        _model(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
    )
    step = jax.jit(
        jax.grad(lambda params, tokens: model.apply(params, tokens).sum())
    )
    compiled = compile_lib.compile_for("v5e", step, params, tokens)
    size = 4 * model_size.count(config).total + 4 * 2 * 512
    # Arrays lie in tiles: small ones take more than they hold.
    self.assertGreaterEqual(compiled.argument_bytes, size)


if __name__ == "__main__":
  absltest.main()
