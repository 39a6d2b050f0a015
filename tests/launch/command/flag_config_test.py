import dataclasses
import enum
import math
import pathlib
import subprocess
import sys
from typing import Literal

from absl import flags
from absl.testing import absltest
from absl.testing import parameterized
import hypothesis
from hypothesis import strategies as st

from launch.command import flag_config
from scansnap_jax.experiment import errors


class Schedule(enum.Enum):
  CONSTANT = 1
  COSINE = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
  """How parameters move.

  Attributes:
    learning_rate: Step size,
      per step.

    schedule: How it decays.
  """

  learning_rate: float = 0.5
  schedule: Schedule = Schedule.CONSTANT

  def __post_init__(self):
    if self.learning_rate <= 0:
      raise errors.UserError(
          f"learning_rate must be positive, got {self.learning_rate}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One run.

  Attributes:
    num_steps: Steps: how many.
    clip: Largest gradient norm.
    use_bias: Whether there is a bias.
    title: Shown above the figure.
    note: Free text.
    kind: Which model.
    size: Which width.
    widths: One layer each.
    decays: One layer each.
    names: One layer each.
    optimizer: How parameters move.
  """

  num_steps: int = 100
  clip: float | None = None
  use_bias: bool = False
  title: str = "run"
  note: str | None = None
  kind: Literal["linear", "mlp"] = "linear"
  size: Literal[16, 32] = 16
  widths: tuple[int, ...] = (1, 2)
  decays: tuple[float, ...] | None = None
  names: tuple[str, ...] = ()
  optimizer: Optimizer = Optimizer()


def _parse(*args, default=None, base=None):
  """Builds a config from a command line of its own."""
  flag_values = flags.FlagValues()
  build = flag_config.define(default or Config(), flag_values=flag_values)
  flag_values(["program", *args])
  return build(base)


class DefineTest(parameterized.TestCase):

  @parameterized.parameters(
      ("--num_steps=7", "num_steps", 7),
      ("--num_steps=-7", "num_steps", -7),
      ("--clip=1e-3", "clip", 1e-3),
      ("--clip=2", "clip", 2.0),
      ("--clip=inf", "clip", math.inf),
      ("--clip=None", "clip", None),
      ("--use_bias", "use_bias", True),
      ("--nouse_bias", "use_bias", False),
      ("--use_bias=true", "use_bias", True),
      ("--use_bias=0", "use_bias", False),
      ("--title=a = b, c", "title", "a = b, c"),
      ("--title=none", "title", "none"),
      ("--note=none", "note", None),
      ("--kind=mlp", "kind", "mlp"),
      ("--size=32", "size", 32),
      ("--widths=3,4, 5", "widths", (3, 4, 5)),
      ("--widths=", "widths", ()),
      ("--decays=.5,1,2", "decays", (0.5, 1.0, 2.0)),
      ("--decays=none", "decays", None),
      ("--names=a b,c", "names", ("a b", "c")),
  )
  def test_text_becomes_the_value_of_the_field_type(self, arg, name, expected):
    # The base has another value everywhere, so that nothing passes by default.
    base = Config(
        clip=9.0,
        use_bias=arg in ("--nouse_bias", "--use_bias=0"),
        note="x",
        widths=(9,),
        decays=(9.0,),
    )  # pyformat: disable
    value = getattr(_parse(arg, base=base), name)
    self.assertEqual(value, expected)
    self.assertIs(type(value), type(expected))

  def test_dotted_flags_reach_nested_fields_only(self):
    config = _parse(
        "--optimizer.learning_rate=2", "--optimizer.schedule=cosine"
    )
    expected = Optimizer(learning_rate=2.0, schedule=Schedule.COSINE)
    self.assertEqual(config, Config(optimizer=expected))

  @parameterized.parameters(
      ("--num_steps=abc", "flag --num_steps=abc: expected an int, such as 3"),
      ("--num_steps=1.5", "flag --num_steps=1.5: expected an int"),
      ("--num_steps=", "expected an int"),
      ("--num_steps=none", "expected an int"),
      ("--num_steps=2147483648", "expected an int from -2147483647 to 2147"),
      ("--clip=x", "flag --clip=x: expected a float"),
      ("--clip=nan", "flag --clip=nan: .*NaN"),
      ("--decays=1,nan", "NaN"),
      ("--decays=1,,2", "no empty item"),
      ("--widths=1,2.5", "flag --widths=1,2.5: expected an int"),
      ("--use_bias=maybe", "flag --use_bias=maybe: expected true or false"),
      ("--kind=mpl", "flag --kind=mpl: expected one of: linear, mlp"),
      ("--size=17", "expected one of: 16, 32"),
      ("--optimizer.schedule=cos", "expected one of: constant, cosine"),
  )
  def test_error_names_flag_value_and_what_would_be_right(self, arg, message):
    with self.assertRaisesRegex(flags.IllegalFlagValueError, message):
      _parse(arg)

  @parameterized.parameters(
      ("--num_stpes=3", "num_steps"),
      ("--optimizer.lerning_rate=3", "optimizer.learning_rate"),
  )
  def test_misspelt_flag_gets_a_suggestion(self, arg, expected):
    with self.assertRaisesRegex(
        flags.UnrecognizedFlagError, f"Did you mean: {expected}"
    ):
      _parse(arg)

  def test_given_flags_are_laid_over_the_base_and_no_others(self):
    base = Config(
        num_steps=5, kind="mlp", optimizer=Optimizer(learning_rate=9.0)
    )
    # num_steps is given its default: given is what counts, not different.
    config = _parse("--num_steps=100", "--optimizer.schedule=cosine", base=base)
    expected = Optimizer(learning_rate=9.0, schedule=Schedule.COSINE)
    self.assertEqual(
        config, Config(num_steps=100, kind="mlp", optimizer=expected)
    )

  def test_flags_in_a_flagfile_count_as_given(self):
    path = self.create_tempfile(content="--num_steps=100\n").full_path
    config = _parse(f"--flagfile={path}", base=Config(num_steps=5))
    self.assertEqual(config, Config(num_steps=100))

  def test_base_of_another_class_is_refused(self):
    with self.assertRaisesRegex(TypeError, "expected a Config"):
      _parse(base=Optimizer())

  def test_build_before_parsing_is_refused(self):
    build = flag_config.define(Config(), flag_values=flags.FlagValues())
    with self.assertRaises(flags.UnparsedFlagAccessError):
      build()

  def test_refused_values_are_reported_with_their_flag(self):
    with self.assertRaisesRegex(
        errors.UserError,
        r"^learning_rate must be positive, got -1.0"
        r" \(from --optimizer.learning_rate\)$",
    ):
      _parse(
          "--optimizer.learning_rate=-1",
          "--optimizer.schedule=cosine",
          "--num_steps=3",
      )

  def test_refused_combination_names_all_that_were_given(self):
    @dataclasses.dataclass(frozen=True)
    class Pair:
      """Pair.

      Attributes:
        low: Low.
        high: High.
        other: Other.
      """

      low: int = 0
      high: int = 1
      other: int = 2

      def __post_init__(self):
        if self.low > self.high:
          raise ValueError("empty range")

    with self.assertRaisesRegex(
        errors.UserError, r"^empty range \(from --low, --high\)$"
    ):
      _parse("--high=3", "--low=4", default=Pair())

  def test_help_and_default_come_from_the_dataclass(self):
    flag_values = flags.FlagValues()
    flag_config.define(Config(), flag_values=flag_values)
    text = flag_values.get_help()
    for expected in (
        "--num_steps: Steps: how many.\n    (default: 100)\n    (an int)",
        "--clip: Largest gradient norm.\n    (default: none)",
        "--[no]use_bias: Whether there is a bias.\n    (default: false)",
        "--widths: One layer each.\n    (default: 1,2)",
        "--optimizer.learning_rate: Step size, per step.\n",
        "--names: One layer each.\n    (default: '')",
        "(one of: constant, cosine)",
    ):
      self.assertIn(expected, text)

  def test_attributes_of_an_extended_class_count(self):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Longer(Optimizer):
      """Longer.

      Attributes:
        num_steps: Steps.
      """

      num_steps: int = 3

    config = _parse("--num_steps=4", "--learning_rate=2", default=Longer())
    self.assertEqual(config, Longer(num_steps=4, learning_rate=2.0))

  def test_undocumented_field_is_an_error(self):
    @dataclasses.dataclass(frozen=True)
    class Undocumented:
      """Nothing.

      Attributes:
        known: Documented.
      """

      known: int = 1
      forgotten: int = 2

    with self.assertRaisesRegex(ValueError, "Undocumented.forgotten"):
      _parse(default=Undocumented())

  @parameterized.parameters(
      dict[str, int], tuple[int, int], int | float, Optimizer | None
  )
  def test_type_that_no_flag_can_hold_is_an_error(self, hint):
    cls = dataclasses.make_dataclass("Odd", [("field", hint)], frozen=True)
    cls.__doc__ = "Odd.\n\nAttributes:\n  field: Text."
    with self.assertRaisesRegex(TypeError, "field: no flag can hold"):
      _parse(default=cls(None))

  def test_config_that_can_change_is_an_error(self):
    cls = dataclasses.make_dataclass("Mutable", [("field", int)])
    with self.assertRaisesRegex(TypeError, "not a frozen dataclass"):
      _parse(default=cls(3))


class ToFlagfileTest(parameterized.TestCase):

  def _replay(self, config, base=None, extra=()):
    text = flag_config.to_flagfile(config, dict(extra))
    path = self.create_tempfile(content=text).full_path
    return _parse(f"--flagfile={path}", base=base)

  @parameterized.parameters(
      {},
      {"clip": 0.1 + 0.2, "num_steps": 2**31 - 1},
      {"clip": 5e-324, "decays": (math.inf, -math.inf, 1e22, 1 / 3)},
      {"decays": (), "names": ("a b", "#c", "--d=e")},
      {"use_bias": True, "note": "", "title": "  a, 'b' \\ \"c\""},
      {"note": "-", "title": "--flagfile=x", "kind": "mlp", "size": 32},
      {"title": "größe \N{GREEK SMALL LETTER ALPHA}"},
  )
  def test_replay_builds_an_equal_config_whatever_the_base(self, **changes):
    config = Config(**changes)
    other = Config(
        num_steps=1,
        clip=1.0,
        use_bias=not config.use_bias,
        title="other",
        note="other",
        widths=(),
        decays=(2.0,),
        names=("other",),
        optimizer=Optimizer(learning_rate=3.0),
    )  # pyformat: disable
    self.assertEqual(self._replay(config), config)
    self.assertEqual(self._replay(config, base=other), config)

  @hypothesis.settings(derandomize=True, deadline=None, max_examples=200)
  @hypothesis.given(
      title=st.text(),
      note=st.none() | st.text(),
      names=st.lists(st.text(alphabet=" ,\nab\x85"), max_size=3),
      decays=st.none() | st.lists(st.floats(allow_nan=False), max_size=3),
  )
  def test_value_is_replayed_exactly_or_refused(
      self, title, note, names, decays
  ):
    config = Config(
        title=title,
        note=note,
        names=tuple(names),
        decays=None if decays is None else tuple(decays),
    )  # pyformat: disable
    try:
      replayed = self._replay(config)
    except errors.UserError as error:
      self.assertRegex(str(error), "^--(title|note|names) cannot be written")
    else:
      self.assertEqual(replayed, config)

  @parameterized.parameters(
      {"title": "two\nlines"},
      {"title": "space at the end "},
      {"title": "not UTF-8: \udcff"},
      {"note": "none"},
      {"note": "None"},
      {"names": ("with, comma",)},
      {"names": ("",)},
      {"names": (" space",)},
      {"clip": math.nan},
  )
  def test_value_without_text_is_refused_by_name(self, **changes):
    (name,) = changes
    with self.assertRaisesRegex(errors.UserError, f"--{name} cannot be"):
      flag_config.to_flagfile(Config(**changes), {})

  def test_extra_flags_come_first_and_none_is_left_out(self):
    text = flag_config.to_flagfile(
        Optimizer(), {"preset": "figure6", "log": True, "seed": None}
    )
    self.assertEqual(
        text,
        "--preset=figure6\n--log=true\n"
        "--learning_rate=0.5\n--schedule=constant\n",
    )

  def test_extra_flag_of_a_field_name_is_an_error(self):
    with self.assertRaisesRegex(ValueError, "num_steps is both"):
      flag_config.to_flagfile(Config(), {"num_steps": 3})


class ImportTest(absltest.TestCase):

  def test_help_stands_where_python_drops_docstrings(self):
    code = (
        "from launch.command import flag_config; from absl import flags;"
        " from joma.inference import sampling_config;"
        " flag_config.define(sampling_config.SamplingConfig());"
        " print(flags.FLAGS['top_k'].help)"
    )
    run = subprocess.run(
        [sys.executable, "-OO", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    self.assertIn("most probable", run.stdout, run.stderr)

  def test_help_does_not_wait_for_jax(self):
    code = (
        "import sys; from launch.command import app, flag_config;"
        "from scansnap_jax.experiment import workdir;"
        "print({'jax', 'flax', 'numpy', 'orbax'} & set(sys.modules))"
    )
    root = pathlib.Path(flag_config.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )  # pyformat: disable
    self.assertEqual(result.stdout, "set()\n")


if __name__ == "__main__":
  absltest.main()
