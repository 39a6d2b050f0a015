from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax.sharding import PartitionSpec as P
import numpy as np

from joma.transformer import config as config_lib
from joma.transformer import sharding
from joma.transformer.training import lm_config
from joma.transformer.training import lm_step
from kernels_pallas import masks
from scansnap_jax.experiment import errors

_MESH = jax.sharding.AbstractMesh(
    (1, 2, 4, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4
)


class PartitionSpecTest(parameterized.TestCase):

  @parameterized.parameters(
      ("token_embed/embedding", (8, 16), P("tensor", "fsdp")),
      ("layers_3/attn/query/kernel", (16, 4, 8), P("fsdp", "tensor", None)),
      ("layers_3/attn/value/bias", (4, 8), P("tensor", None)),
      ("layers_3/attn/out/kernel", (4, 8, 16), P("tensor", None, "fsdp")),
      ("layers_3/attn/out/bias", (16,), P()),
      ("layers_3/mlp/gate/kernel", (16, 32), P("fsdp", "tensor")),
      ("layers_3/mlp/down/kernel", (32, 16), P("tensor", "fsdp")),
      ("output/kernel", (16, 8), P("fsdp", "tensor")),
      ("layers_3/attn_norm/scale", (16,), P()),
      # Moments lie as their parameters do; 6 heads are not for 4 devices.
      ("opt_state/1/mu/output/kernel", (16, 8), P("fsdp", "tensor")),
      ("layers_0/attn/key/kernel", (16, 6, 8), P("fsdp", None, None)),
      ("output/kernel", (16, 28_782), P("fsdp", None)),
  )
  def test_is_the_tables(self, path, shape, expected):
    self.assertEqual(sharding.partition_spec(path, shape, _MESH), expected)

  def test_every_matrix_of_the_state_is_split(self):
    # All axes are divisible, so that only a missing rule leaves one whole.
    model = config_lib.TransformerConfig(
        vocab_size=64,
        num_layers=1,
        embed_dim=16,
        hidden_dim=32,
        tie_embeddings=False,
        positions="learned",
        max_len=8,
        use_qkv_bias=True,
    )
    config = lm_config.LmConfig(model=model, seq_len=8, optimizer="adam")
    task = lm_step.make_task(config, 1, 1)
    state = jax.eval_shape(lambda: lm_step.init(task))

    num_kernels = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
      names = [jax.tree_util.keystr((key,), simple=True) for key in path]
      if names[-1] in ("kernel", "embedding"):
        num_kernels += 1
        name = "/".join(names)
        axes = sharding.partition_spec(name, leaf.shape, _MESH)
        self.assertIn("fsdp", axes, name)
    self.assertEqual(num_kernels, 3 * 10)  # Parameters and two moments.


class MakeMeshTest(absltest.TestCase):

  def test_refuses_what_does_not_divide_the_devices(self):
    with self.assertRaisesRegex(
        errors.UserError, "seq=1 must divide the 3 .* can be 1, 3"
    ):
      sharding.make_mesh(2, 1, devices=jax.devices()[:1] * 3)

  def test_data_has_what_is_left(self):
    mesh = sharding.make_mesh()
    self.assertEqual(dict(mesh.shape)["data"], len(jax.devices()))


class PerPartTest(absltest.TestCase):

  def test_a_mask_of_each_sequence_is_split_with_it(self):
    seen = []

    def attend(query, key, value, mask):
      del key, value
      seen.append((query.shape, mask.starts.shape, type(mask.starts)))
      return query

    query = jax.ShapeDtypeStruct((4, 8, 4, 8), np.float32)
    known = masks.causal(8)
    batched = jax.tree.map(
        lambda leaf: np.broadcast_to(leaf, (4, *leaf.shape)), known
    )
    with jax.sharding.use_abstract_mesh(_MESH):
      for mask in (known, batched):
        jax.eval_shape(
            lambda q, mask=mask: sharding.per_part(attend, q, q, q, mask),
            query,
        )
    self.assertEqual(seen[0], ((2, 8, 1, 8), (1, 8), np.ndarray))
    self.assertEqual(seen[1][:2], ((2, 8, 1, 8), (2, 1, 8)))


if __name__ == "__main__":
  absltest.main()
