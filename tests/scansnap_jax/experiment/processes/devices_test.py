import fnmatch
import os
import pathlib
import subprocess
import sys
import types
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax.experimental import multihost_utils
import numpy as np
import pytest

from scansnap_jax.experiment import errors
from scansnap_jax.experiment.processes import devices
from scansnap_jax.experiment.processes import rendezvous

_ROOT = pathlib.Path(__file__).parents[4]
_VARIABLES = {
    "JAX_COORDINATOR_ADDRESS": "host0:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "2",
}
_COORDINATES = dict(
    coordinator_address="host0:1234", num_processes=4, process_id=2
)

# Five cores: one device, JAX's own default, and this machine's are others.
_SPLIT = """
import os
os.sched_getaffinity = lambda pid: set(range(5))
from scansnap_jax.experiment.processes import devices
devices.set_up({arguments})
import jax
import numpy as np
squares = jax.pmap(lambda x: x * x)(np.arange(jax.device_count()))
print(devices.describe(), *np.asarray(squares))
"""


def _environment(**variables):
  """Patches this process's coordinates, whatever the machine sets."""
  others = {k: v for k, v in os.environ.items() if k not in _VARIABLES}
  return mock.patch.dict(os.environ, {**others, **variables}, clear=True)


class SetUpTest(parameterized.TestCase):

  @parameterized.parameters(
      ("", "5 x cpu 0 1 4 9 16\n"),
      ("num_cpu_devices=0", "5 x cpu 0 1 4 9 16\n"),
      ("num_cpu_devices=3", "3 x cpu 0 1 4\n"),
      ("num_cpu_devices=1", "1 x cpu 0\n"),
  )
  @pytest.mark.by_default(0)
  def test_splits_the_cpu_into_devices_that_compute(self, arguments, expected):
    process = subprocess.run(
        [sys.executable, "-c", _SPLIT.format(arguments=arguments)],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        check=False,
    )
    self.assertEqual(process.stdout, expected, process.stderr)

  @parameterized.parameters(
      ("linux", "", [], "cpu"),
      ("linux", "", ["/dev/vfio/0"], ""),
      ("linux", "tpu", [], "tpu"),
      ("darwin", "", [], ""),
  )
  def test_chooses_the_cpu_where_nothing_else_is(
      self, system, chosen, found, expected
  ):
    config = types.SimpleNamespace(jax_platforms=chosen)
    config.update = lambda name, value: setattr(config, name, value)
    with (
        mock.patch.object(jax, "config", config),
        mock.patch.object(sys, "platform", system),
        mock.patch.object(
            devices.glob, "glob", lambda name: fnmatch.filter(found, name)
        ),
    ):
      devices.set_up()
    self.assertEqual(config.jax_platforms, expected)

  def test_joins_nobody_unless_asked(self):
    with (
        _environment(**_VARIABLES),
        mock.patch.object(jax.config, "update"),
        mock.patch.object(jax.distributed, "initialize") as initialize,
    ):
      self.assertIsNone(devices.set_up())
    initialize.assert_not_called()

  def test_compares_with_the_others_before_jax_joins_them(self):
    peers, calls = mock.Mock(spec=rendezvous.Peers), mock.Mock()
    with (
        _environment(**_VARIABLES),
        mock.patch.object(jax.config, "update"),
        mock.patch.object(rendezvous, "meet", return_value=peers) as meet,
        mock.patch.object(jax.distributed, "initialize") as initialize,
    ):
      calls.attach_mock(peers.compare, "compare")
      calls.attach_mock(initialize, "initialize")
      found = devices.set_up(multihost=True, facts={"--lr": "1"}, timeout=7)
    self.assertIs(found, peers)
    meet.assert_called_once_with("host0:1234", 4, 2, timeout=7)
    local = f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"
    self.assertEqual(
        calls.mock_calls,
        [
            mock.call.compare({"--lr": "1"}),
            # Its own patience ends after ours.
            mock.call.initialize(**_COORDINATES, heartbeat_timeout_seconds=74),
            mock.call.compare({"the kind and number of local devices": local}),
        ],
    )

  def test_a_platform_without_a_device_is_one_sentence(self):
    """jax asserts that there is one; a driver writes a page before."""
    read, write = os.pipe()
    kept = os.dup(2)
    os.dup2(write, 2)

    def fail():
      os.write(2, b"a page")
      raise AssertionError

    config = types.SimpleNamespace(
        jax_platforms="tpu", update=lambda name, value: None
    )
    self.enterContext(mock.patch.object(jax, "config", config))
    try:
      with (
          mock.patch.object(jax, "devices", side_effect=fail),
          self.assertRaisesRegex(
              errors.UserError, "no device of it was found$"
          ),
      ):
        devices.set_up()
      with mock.patch.object(jax, "devices", lambda: os.write(2, b"kept")):
        devices.set_up()
      # A CPU writes no page; what XLA says before it ends the process is seen.
      config.jax_platforms = "cpu"
      with (
          mock.patch.object(jax, "devices", side_effect=fail),
          self.assertRaises(errors.UserError),
      ):
        devices.set_up()
    finally:
      os.dup2(kept, 2)
      for number in (kept, write):
        os.close(number)
    with os.fdopen(read, "rb") as shown:
      self.assertEqual(shown.read(), b"kepta page")

  def test_a_platform_that_is_absent_is_named(self):
    failed = RuntimeError("Unable to initialize backend 'cuda'\nmore\nlines")
    with (
        mock.patch.object(jax.config, "update"),
        mock.patch.object(jax, "devices", side_effect=failed),
        self.assertRaisesRegex(
            errors.UserError, "cannot be used here: Unable to .* 'cuda'$"
        ),
    ):
      devices.set_up()

  @parameterized.parameters(
      ("JAX_ENABLE_X64", "1"),
      ("JAX_THREEFRY_PARTITIONABLE", "0"),
      ("JAX_DEFAULT_PRNG_IMPL", "rbg"),
      ("JAX_RANDOM_SEED_OFFSET", "1"),
      ("JAX_HIGH_DYNAMIC_RANGE_GUMBEL", "1"),
      ("JAX_NUMPY_DTYPE_PROMOTION", "strict"),
  )
  @pytest.mark.slow
  def test_the_environment_does_not_decide_the_bits(self, name, value):
    draw = """
from scansnap_jax.experiment.processes import devices
devices.set_up(num_cpu_devices=1)
import jax
print(jax.random.normal(jax.random.key(1), (3,)), jax.numpy.zeros(1).dtype)
print(jax.random.gumbel(jax.random.key(1), (3,)) + jax.numpy.arange(3))
"""
    plain = {k: v for k, v in os.environ.items() if k != name}
    outputs = {
        subprocess.run(
            [sys.executable, "-c", draw],
            capture_output=True,
            text=True,
            cwd=_ROOT,
            env={**plain, "JAX_PLATFORMS": "cpu", **extra},
            check=True,
        ).stdout
        for extra in ({}, {name: value})
    }
    self.assertLen(outputs, 1)
    self.assertIn("float32", outputs.pop())

  @parameterized.parameters(
      ("jax_transfer_guard", "disallow"),
      ("jax_transfer_guard_host_to_device", "disallow_explicit"),
  )
  def test_a_guard_that_forbids_what_is_done_everywhere_is_named(
      self, name, value
  ):
    config = types.SimpleNamespace(**{name: value})
    with (
        mock.patch.object(jax, "config", config),
        self.assertRaisesRegex(
            errors.UserError, f"{name.upper()}={value} cannot be used here"
        ),
    ):
      devices.set_up()

  @parameterized.parameters(
      ("", False, {}),
      ("--xla_backend_optimization_level=0", False, {}),
      ("", True, {"JAX_DISABLE_MOST_OPTIMIZATIONS": "True"}),
      (
          "--xla_dump_to=x --xla_cpu_enable_fast_math=true",
          False,
          {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"},
      ),
  )
  def test_what_else_decides_numbers_is_named_where_it_is_set(
      self, xla_flags, is_unoptimized, expected
  ):
    values = {
        "jax_default_matmul_precision": None,
        "jax_disable_jit": False,
        "jax_disable_most_optimizations": is_unoptimized,
    }
    with (
        mock.patch.object(jax, "config", types.SimpleNamespace(values=values)),
        mock.patch.dict(os.environ, {"XLA_FLAGS": xla_flags}),
    ):
      self.assertEqual(devices.number_settings(), expected)


class NumCoresTest(parameterized.TestCase):

  def test_counts_the_cores_of_this_process(self):
    with mock.patch.object(
        os, "sched_getaffinity", lambda pid: {3, 5, 8}, create=True
    ):
      self.assertEqual(devices.num_cores(), 3)

  @parameterized.parameters((7, 7), (None, 1))
  def test_counts_all_cores_where_a_process_has_no_own(self, cores, expected):
    with (
        mock.patch.object(os, "sched_getaffinity", create=True),
        mock.patch.object(os, "cpu_count", return_value=cores),
    ):
      del os.sched_getaffinity
      self.assertEqual(devices.num_cores(), expected)


class ProcessFromEnvironmentTest(parameterized.TestCase):

  def test_reads_the_three_variables(self):
    with _environment(**_VARIABLES):
      self.assertEqual(devices._process_from_environment(), _COORDINATES)

  def test_leaves_a_recognized_cluster_to_jax(self):
    with _environment():
      self.assertEqual(devices._process_from_environment(), {})


class DescribeTest(parameterized.TestCase):

  @parameterized.parameters((8, "TPU v5 lite"), (1, "NVIDIA H200"))
  def test_names_how_many_and_which(self, count, kind):
    device = types.SimpleNamespace(device_kind=kind)
    with (
        mock.patch.object(jax, "device_count", return_value=count),
        mock.patch.object(jax, "devices", return_value=[device] * count),
    ):
      self.assertEqual(devices.describe(), f"{count} x {kind}")


class MainProcessFirstTest(parameterized.TestCase):

  def _run(self, fails_here, main_went_well):
    """Runs a block on one of two processes; the main one told the other."""
    with (
        mock.patch.object(jax, "process_count", return_value=2),
        mock.patch.object(
            multihost_utils,
            "broadcast_one_to_all",
            return_value=np.array(main_went_well),
        ) as broadcast,
    ):
      try:
        with devices.main_process_first():
          if fails_here:
            raise KeyError("mine")
      finally:
        # Whatever happened, nobody is left waiting.
        broadcast.assert_called_once_with(np.array(not fails_here))

  def test_goes_on_if_the_main_process_does(self):
    self._run(fails_here=False, main_went_well=True)

  def test_stops_if_the_main_process_does(self):
    with self.assertRaisesRegex(errors.UserError, "as the main process did"):
      self._run(fails_here=False, main_went_well=False)

  @parameterized.parameters(False, True)
  def test_own_error_comes_first(self, main_went_well):
    with self.assertRaises(KeyError):
      self._run(fails_here=True, main_went_well=main_went_well)

  def test_one_process_waits_for_nobody(self):
    with mock.patch.object(multihost_utils, "broadcast_one_to_all") as send:
      with devices.main_process_first():
        pass
    send.assert_not_called()


class IsMainProcessTest(parameterized.TestCase):

  @parameterized.parameters((0, True), (1, False))
  def test_is_the_first_process(self, index, expected):
    with mock.patch.object(jax, "process_index", return_value=index):
      self.assertIs(devices.is_main_process(), expected)


if __name__ == "__main__":
  absltest.main()
