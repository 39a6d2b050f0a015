"""Probes of a run over a mesh are those of one device."""

import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
import numpy as np
import pytest

_ROOT = pathlib.Path(__file__).parents[3]
_PROBES = (
    "sinks",
    "sink_of_means",
    "secondary_sinks",
    "concentration",
    "diversity",
    "local",
    "update_rank",
)
_TINY = (
    f"--probes={','.join(_PROBES)}",
    "--model.attention=ssa+key_bias,softmax",
    "--model.num_layers=2",
    "--model.embed_dim=16",
    "--model.num_heads=4",
    "--model.num_kv_heads=2",
    "--model.head_dim=8",
    "--model.hidden_dim=16",
    "--batch_size=4",
    "--seq_len=8",
    "--num_steps=2",
    "--log_every=1",
    "--eval_every=2",
    "--optimizer=adam",
)


class MeshProbesTest(absltest.TestCase):

  def _probes(self, root, name, *arguments):
    text = root / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 99)
    command = [
        sys.executable, "-m", "launch.train_lm", f"--workdir={root / name}",
        f"--corpus={text}", *_TINY, *arguments,
    ]  # fmt: skip
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    done = subprocess.run(
        command, env=env, cwd=_ROOT, capture_output=True, text=True, check=False
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    return json.loads((root / name / "summary.json").read_text())[
        "named_probes"
    ]

  @pytest.mark.slow
  def test_eight_devices_see_what_one_does(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    one = self._probes(root, "one")
    mesh = ("--parallelism=mesh", "--fsdp=2", "--tensor=2")
    many = self._probes(root, "many", "--num_cpu_devices=8", *mesh)
    for probe in _PROBES:  # Some have several curves.
      self.assertTrue(any(name.startswith(probe) for name in one), [*one])
    self.assertEqual([*many], [*one])
    for name in one:
      got, want = (np.array(x[name], float) for x in (many, one))
      self.assertLen(want, 2, name)  # Layers.
      self.assertTrue(np.isfinite(want).all(), name)
      np.testing.assert_allclose(got, want, atol=1e-5, err_msg=name)


if __name__ == "__main__":
  absltest.main()
