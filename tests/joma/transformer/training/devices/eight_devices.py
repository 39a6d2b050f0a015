"""Loss and gradients of small models on one device and on 2 x 2 x 2.

Run as `python -m tests.joma.transformer.training.devices.eight_devices FIELDS`,
a JSON list of what each config has beside small sizes; prints the largest
difference of each model.
"""

import json
import os
import pathlib
import subprocess
import sys

from flax import linen as nn
import jax
import jax.numpy as jnp

from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer import sharding
from tests.joma.transformer import applied


def differences(changes):
  """What the program prints of such configs."""
  # Beside the suite's own flags, by which a program compiles in a tenth.
  flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
  printed = subprocess.check_output(
      [sys.executable, "-m", __name__, json.dumps(changes)],
      env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
      cwd=pathlib.Path(__file__).parents[5],
      text=True,
  )
  return json.loads(printed)


def _difference(fields, tokens, mesh):
  sizes = dict(vocab_size=12, num_layers=1, embed_dim=16, num_heads=4)
  sizes |= dict(num_kv_heads=2, head_dim=8, hidden_dim=16)
  fields = fields | {"attention": tuple(fields.get("attention", ()))}
  module = models.Transformer(
      configs.TransformerConfig(**sizes | fields), implementation="xla"
  )
  params = applied.params(module)

  @jax.jit
  def run(params, tokens):
    def loss(params):
      with nn.intercept_methods(sharding.keep_split):
        return jnp.square(module.apply({"params": params}, tokens)).mean()

    return jax.value_and_grad(loss)(params)

  want = run(params, tokens)
  with jax.set_mesh(mesh):
    put = jax.device_put(params, sharding.shardings(params, mesh))
    batch = jax.device_put(tokens, sharding.batch_sharding(mesh, 2, 0))
    got = run(put, batch)
  got, want = jax.device_get((got, want))
  apart = jax.tree.map(lambda a, b: float(abs(a - b).max()), got, want)
  return max(jax.tree.leaves(apart))


def main(changes):
  """Prints the differences."""
  tokens = jax.random.randint(jax.random.key(1), (4, 12), 0, 12)
  mesh = sharding.make_mesh(2, 2)
  print(json.dumps([_difference(one, tokens, mesh) for one in changes]))


if __name__ == "__main__":
  main(json.loads(sys.argv[1]))
