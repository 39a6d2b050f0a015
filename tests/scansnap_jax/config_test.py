import dataclasses
import inspect
import math
import re

from absl.testing import absltest
from absl.testing import parameterized

from scansnap_jax import config as config_lib
from scansnap_jax.experiment import errors

_CONFIGS = {
    "data": config_lib.DataConfig,
    "model": config_lib.ModelConfig,
    "optimizer": config_lib.OptimizerConfig,
}

# Section 3.1 and Appendix G: 10 common tokens, 10 distinct tokens of a class
# with weights from .1 to 1, sequences of 128 tokens.
_SYN_SMALL = dict(
    num_next_per_last=1,
    num_common=10,
    num_common_per_last=0,
    num_distinct_per_next=10,
    common_weight=1.0,
    distinct_weight_min=0.1,
    distinct_weight_max=1.0,
    seq_len=128,
    classes_file=None,
)
_SYN_MEDIUM = {**_SYN_SMALL, "num_next_per_last": 2}
_FROM_ZERO = dict(
    parametrization="reparametrized",
    embed_dim=64,
    zero_init=True,
    normalization="l2",
    use_residual=False,
    query_in_context=False,
)
_FROM_RANDOM = {**_FROM_ZERO, "zero_init": False}
_MOMENTUM = dict(name="momentum", momentum=0.9)
_FIGURE_4 = dict(
    data=_SYN_SMALL,
    model=_FROM_ZERO,
    optimizer=_MOMENTUM,
    num_last=(2,),
    lr_z=(1.0,),
    lr_ratio=(1.0, 10.0),
    num_seeds=20,
    first_seed=0,
    batch_size=128,
    num_steps=100,
    log_every=2,
    checkpoint_every=100,
    record_attention=True,
)
_FIGURE_6 = {
    **_FIGURE_4,
    "data": _SYN_MEDIUM,
    "model": _FROM_RANDOM,
    "num_last": (1, 3, 5, 10),
    "lr_z": (0.5, 1.0, 2.0, 3.0),
    "lr_ratio": (1.0, 2.0, 5.0, 10.0),
    "num_seeds": 10,
    "log_every": 50,
    "record_attention": False,
}
_PAPER = {
    "figure4": _FIGURE_4,
    "figure5": {
        **_FIGURE_4,
        "optimizer": dict(name="adam", momentum=0.9),
        "lr_z": (0.1, 0.5, 1.0),
        "lr_ratio": (1.0,),
    },
    "figure6": _FIGURE_6,
    "figure11": {**_FIGURE_6, "lr_ratio": (1.0,)},
    "figure12": {**_FIGURE_6, "lr_z": (1.0,)},
}

_NOT_POSITIVE = (0.0, -1.0, math.nan, math.inf)
# Every field that has values to refuse, with some of them.
_INVALID = {
    "data.num_next_per_last": (0, -1),
    "data.num_common": (-1,),
    "data.num_common_per_last": (-1,),
    "data.num_distinct_per_next": (0, -1),
    "data.common_weight": _NOT_POSITIVE,
    "data.distinct_weight_min": _NOT_POSITIVE,
    "data.distinct_weight_max": _NOT_POSITIVE,
    "data.seq_len": (1, 0, -128, 2**24 + 1),
    "model.embed_dim": (0, -64),
    "optimizer.momentum": (-0.1, 1.0, math.nan, math.inf),
    "num_last": ((), (2, 2), (0,), (1, -3)),
    "lr_z": ((), (0.5, 1.0, 0.5), *((1.0, rate) for rate in _NOT_POSITIVE)),
    "lr_ratio": ((), (2.0, 2.0), *((rate,) for rate in _NOT_POSITIVE)),
    "num_seeds": (0, -1),
    "first_seed": (-1, 2**31),
    "batch_size": (0, -1),
    "num_steps": (0, -1),
    "log_every": (0, -1),
    "checkpoint_every": (0, -1),
}
# The type of these says what they may be.
_FREE = {
    "data.classes_file",
    "model.parametrization",
    "model.zero_init",
    "model.normalization",
    "model.use_residual",
    "model.query_in_context",
    "optimizer.name",
    "record_attention",
}
_ALLOWED = (
    ("data.num_common", 0),
    ("data.num_common_per_last", 0),
    ("data.num_distinct_per_next", 1),
    ("data.seq_len", 2),
    ("data.seq_len", 2**24),
    ("data.seq_len", None),
    ("model.embed_dim", 1),
    ("optimizer.momentum", 0.0),
    ("lr_z", (3e38,)),
    ("num_last", (1,)),
    ("num_seeds", 1),
    ("first_seed", 2**31 - 10),
    ("batch_size", 1),
    ("num_steps", 1),
    ("log_every", 101),
    ("checkpoint_every", 1),
)


def _make(name, value):
  """Builds the config, or the part of it, that has this field."""
  part, _, field = name.rpartition(".")
  make = _CONFIGS.get(part, config_lib.ScanSnapConfig)
  return getattr(make(**{field: value}), field)


def _leaves(config, prefix=""):
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from _leaves(value, f"{field.name}.")
    else:
      yield prefix + field.name


def _values_in(value):
  """What a message has to show: the value, or the bad one of several."""
  if not isinstance(value, tuple) or len(set(value)) < len(value) or not value:
    return str(value)
  return str(value[-1])


class PresetTest(parameterized.TestCase):

  @parameterized.parameters(*_PAPER)
  def test_settings_are_the_papers(self, name):
    config = getattr(config_lib, name)()
    self.assertEqual(dataclasses.asdict(config), _PAPER[name])

  def test_every_preset_is_looked_at(self):
    presets = [
        name
        for name, function in inspect.getmembers(config_lib, inspect.isfunction)
        if inspect.signature(function).return_annotation
        is config_lib.ScanSnapConfig
    ]
    self.assertCountEqual(presets, [*_PAPER, "smoke"])  # Not the paper's.


class NumRunsTest(parameterized.TestCase):

  @parameterized.parameters(
      ("figure4", 2 * 20),
      ("figure5", 3 * 20),
      ("figure6", 4 * 4 * 4 * 10),
      ("figure11", 4 * 4 * 10),
      ("figure12", 4 * 4 * 10),
  )
  def test_of_the_paper(self, name, expected):
    self.assertEqual(getattr(config_lib, name)().num_runs, expected)

  def test_is_the_product_of_the_axes(self):
    config = config_lib.ScanSnapConfig(
        num_last=(1, 2),
        lr_z=(1.0, 2.0, 3.0),
        lr_ratio=(1.0, 2.0, 3.0, 4.0, 5.0),
        num_seeds=7,
    )
    self.assertEqual(config.num_runs, 2 * 3 * 5 * 7)


class ValidationTest(parameterized.TestCase):

  @parameterized.parameters(
      (name, value) for name, values in _INVALID.items() for value in values
  )
  def test_names_the_field_and_the_value(self, name, value):
    with self.assertRaises(errors.UserError) as caught:
      _make(name, value)
    message = str(caught.exception)
    self.assertRegex(message, rf"^{re.escape(name)}\b")
    self.assertIn(_values_in(value), message.removeprefix(name))

  @parameterized.parameters(*_ALLOWED)
  def test_boundary_is_allowed(self, name, value):
    self.assertEqual(_make(name, value), value)

  def test_every_field_is_looked_at(self):
    fields = [*_leaves(config_lib.ScanSnapConfig())]
    self.assertCountEqual(fields, [*_INVALID, *_FREE])

  def test_product_of_rates_must_fit_float32(self):
    with self.assertRaisesRegex(
        errors.UserError,
        r"lr_z=\(1.0, 1e\+38\) with lr_ratio=\(0.5, 10.0\) reaches 1e\+39",
    ):
      config_lib.ScanSnapConfig(lr_z=(1.0, 1e38), lr_ratio=(0.5, 10.0))
    # A small ratio does not make a rate eta_Z that is too large small.
    with self.assertRaisesRegex(errors.UserError, r"reaches 1e\+39"):
      config_lib.ScanSnapConfig(lr_z=(1e39,), lr_ratio=(0.1,))

  def test_last_seed_must_fit_int32(self):
    config_lib.ScanSnapConfig(first_seed=2**31 - 3, num_seeds=3)
    with self.assertRaisesRegex(
        errors.UserError, "first_seed must be from 0 to 2147483644"
    ):
      config_lib.ScanSnapConfig(first_seed=2**31 - 3, num_seeds=4)

  def test_a_classes_file_is_one_data_setting(self):
    data = config_lib.DataConfig(classes_file="my.npz", num_distinct_per_next=0)
    config_lib.ScanSnapConfig(data=data, num_last=(3,))
    with self.assertRaisesRegex(
        errors.UserError, r"num_last=\(1, 3\).*data.classes_file=my.npz"
    ):
      config_lib.ScanSnapConfig(data=data, num_last=(1, 3))

  def test_original_parametrization_needs_a_random_start(self):
    config_lib.ModelConfig(parametrization="original", zero_init=False)
    with self.assertRaisesRegex(errors.UserError, "model.zero_init=True"):
      config_lib.ModelConfig(parametrization="original")


if __name__ == "__main__":
  absltest.main()
