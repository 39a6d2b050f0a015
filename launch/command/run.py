"""A run from claim to report: what every script does around its own work.

  with run.start("scansnap", folder) as this:
    results = train.train_and_evaluate(config, this.folder)
    this.finish(lambda: report.write(this.folder, results))

claims the folder and keeps a second run out of it; a run that SIGTERM stops
says that the same command continues it. On several hosts all measure, and the
main process alone claims and reports. `run` is the same with callbacks.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
from importlib import metadata
import pathlib
import platform
import secrets
import shlex
import sys
import time
from typing import Any, NamedTuple, TypeVar

from absl import flags

from launch.command import trackers
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file
from scansnap_jax.experiment import workdir as workdir_lib
from scansnap_jax.experiment.venues import page

flags.disclaim_key_flags()  # --help lists the flags under the script.

Measured = TypeVar("Measured")
# The preset that tries a whole script out.
SMOKE = "smoke"


class Folder(NamedTuple):
  """The folder that a run asks for, and what makes it this run's.

  Attributes:
    path: Its path, as given.
    settings: All settings in plain JSON types; another run's are refused.
    flagfile: Text of flags.txt, with which the run can be repeated.
    may_differ: Settings, by their dotted names, in which a run that goes on
      may differ from the one that began.
  """

  path: str
  settings: Mapping[str, Any]
  flagfile: str
  may_differ: tuple[str, ...] = ()


class Run(NamedTuple):
  """A run under way: where its files go, and what its report says of it.

  Attributes:
    workdir: Absolute path of the claimed folder; None writes no file.
    facts: Command and devices.
    started: `time.monotonic()` at the start.
  """

  workdir: pathlib.Path | None
  facts: Mapping[str, str]
  started: float

  @property
  def folder(self) -> pathlib.Path:
    """The folder of a run that always has one.

    Raises:
      ValueError: The run has none.
    """
    if self.workdir is None:
      raise ValueError("this run writes no file")
    return self.workdir

  def finish(self, report: Callable[[], pathlib.Path | None]) -> None:
    """Reports on the main process, and says where and how fast.

    Args:
      report: Writes the report of what was measured; returns its path.
    """
    from scansnap_jax.experiment.processes import devices

    if devices.is_main_process():
      path = report()
      where = f" Report: {path}" if path else ""
      print(f"{time.monotonic() - self.started:.1f} s.{where}")


def define_workdir(
    text: str = "Local folder of this run.",
    *,
    is_required: bool = True,
    has_figures: bool = True,
) -> flags.FlagHolder:
  """Defines --workdir, and --figure_style, which `start` reads."""
  if has_figures:
    flags.DEFINE_enum(
        "figure_style",
        page.SCREEN,
        page.NAMES,
        "Page that figures are drawn for: screen, or a paper's, its text width"
        " and letters, with the extra [figures]. A run that is done draws"
        " anew.",
    )
  return flags.DEFINE_string("workdir", None, text, required=is_required)


def define_preset() -> flags.FlagHolder:
  """Defines --preset for a script whose settings are one default."""
  return flags.DEFINE_enum(
      "preset",
      "default",
      ["default", SMOKE],
      "Settings to start from; smoke does all of the work in seconds, at sizes"
      " at which numbers mean nothing.",
  )


def define_data_dir() -> flags.FlagHolder:
  """Defines --data_dir."""
  return flags.DEFINE_string(
      "data_dir", None, "Folder that holds the corpus, or its folder."
  )


def define_reference_csv() -> flags.FlagHolder:
  """Defines --reference_csv."""
  return flags.DEFINE_string(
      "reference_csv",
      None,
      "Curves to draw beside: nlayers, lr, seed, minibatch, val_loss, and"
      " attn_entropy_layer0 to the last.",
  )


def define_multihost() -> flags.FlagHolder:
  """Defines --multihost, and --multihost_timeout, which `run` reads.

  And --grace, as what starts processes on many hosts also ends them.
  """
  flags.DEFINE_integer(
      "grace",
      0,
      "Seconds that a run has to save after SIGTERM, Ctrl-C or SIGHUP, before"
      " it is ended; 0 is as long as it takes until its next evaluation.",
      0,
  )
  flags.DEFINE_integer(
      "multihost_timeout",
      300,
      "Seconds that a process waits for the others of a --multihost run, at"
      " the start and, when one gives no sign of life any more, until all end.",
      1,
  )
  return flags.DEFINE_boolean(
      "multihost", False, "Set when the same command runs on every host."
  )


def define_num_cpu_devices() -> flags.FlagHolder:
  """Defines --num_cpu_devices."""
  return flags.DEFINE_integer(
      "num_cpu_devices",
      0,
      "Devices to split a CPU into; 0 is one per core.",
      0,
      4096,
  )


def define_mesh() -> flags.FlagHolder:
  """Defines --mesh, which `mesh_sizes` reads."""
  return flags.DEFINE_string(
      "mesh",
      None,
      "Devices along the axes data, fsdp, tensor and, if wanted, seq of a mesh,"
      " as 2,1,4 or 1,2,2,2: data splits sequences, fsdp parameters too, tensor"
      " heads and hidden units, seq positions. A CPU is split into as many.",
  )


def mesh_sizes(mesh: str | None) -> tuple[int, ...] | None:
  """Sizes of data, fsdp, tensor and seq; None where --mesh is not given.

  Raises:
    UserError: It is no mesh.
  """
  from scansnap_jax.experiment.processes import mesh_config

  return None if mesh is None else mesh_config.sizes_of(mesh)


def command(script: str) -> str:
  """The command line that started this process."""
  return f"python -m launch.{script} {shlex.join(sys.argv[1:])}"


@contextlib.contextmanager
def start(
    script: str,
    folder: Callable[[], Folder] | None,
    *,
    check: Callable[[], object] = lambda: None,
    multihost: bool = False,
    num_cpu_devices: int = 1,
) -> Iterator[Run]:
  """Claims the folder for what follows, which `preemption.Stopped` may end.

  Args:
    script: Name of the script in `launch`.
    folder: Returns what to claim; called after `check`.
      None measures without writing a file.
    check: Raises what is wrong with the settings, before the claim.
    multihost: Whether every host runs this command.
    num_cpu_devices: Devices to split a CPU into, 0 for one a core. One takes
      all cores for its computations.

  Yields:
    The run.

  Raises:
    UserError: As `workdir.claim`, `workdir.lock` and `check`, or hosts differ.
    SystemExit: A signal stopped the run, which is not finished: 143 after
      SIGTERM, 130 after Ctrl-C.
  """
  started = time.monotonic()
  # Imported here, so that --help and wrong flags answer at once.
  from scansnap_jax.experiment import progress
  from scansnap_jax.experiment.processes import devices
  from scansnap_jax.experiment.processes import preemption
  from scansnap_jax.experiment.processes import rendezvous

  peers = devices.set_up(
      multihost=multihost,
      num_cpu_devices=num_cpu_devices,
      facts=_facts_of_all_hosts() if multihost else None,
      timeout=flags.FLAGS.multihost_timeout if multihost else 0,
  )
  progress.set_main(devices.is_main_process())
  preemption.set_grace(flags.FLAGS.grace if "grace" in flags.FLAGS else 0)
  if "figure_style" in flags.FLAGS:
    page.use(flags.FLAGS.figure_style)
  trackers.check()
  check()
  with (
      rendezvous.heard_out(peers),
      _claimed(folder, peers) as workdir,
      trackers.shown(workdir, lambda: folder().settings if folder else {}),
  ):
    facts = {"command": command(script), "devices": devices.describe()}
    try:
      yield Run(workdir, facts, started)
    except preemption.Stopped as stopped:
      print(
          f"Stopped in {stopped}. The same command continues.", file=sys.stderr
      )
      if peers is not None:
        peers.leave()
      raise SystemExit(stopped.status) from stopped
    if peers is not None:
      peers.leave()


def run(
    script: str,
    folder: Callable[[], Folder] | None,
    *,
    measure: Callable[[Run], Measured],
    report: Callable[[Run, Measured], pathlib.Path | None],
    check: Callable[[], object] = lambda: None,
    multihost: bool = False,
    num_cpu_devices: int = 1,
) -> None:
  """Claims the folder, measures and reports.

  Args:
    script: As `start`.
    folder: As `start`.
    measure: Takes the run. It may raise `preemption.Stopped`.
    report: Takes the run and what was measured; returns the report's path.
    check: As `start`.
    multihost: As `start`.
    num_cpu_devices: As `start`.

  Raises:
    UserError: As `start` and the callbacks.
  """
  with start(
      script,
      folder,
      check=check,
      multihost=multihost,
      num_cpu_devices=num_cpu_devices,
  ) as this:
    measured = measure(this)
    this.finish(lambda: report(this, measured))


# Flags in which hosts may differ: where things lie on each.
_OF_A_HOST = (
    *("compilation_cache", "data_dir", "flagfile", "reference_csv", "workdir"),
)
_DEPENDENCIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def _facts_of_all_hosts() -> dict[str, str]:
  """What must be equal on all hosts: flags, versions, number settings."""
  from scansnap_jax.experiment.processes import devices

  given = flags.FLAGS.flag_values_dict()
  facts = {
      f"--{name}": str(value)
      for name, value in given.items()
      if name not in _OF_A_HOST
  }
  facts["the version of Python"] = platform.python_version()
  for name in _DEPENDENCIES:
    facts[f"the version of {name}"] = metadata.version(name)
  return facts | devices.number_settings()


@contextlib.contextmanager
def _claimed(
    folder: Callable[[], Folder] | None, peers: Any = None
) -> Iterator[pathlib.Path | None]:
  """Claims and locks the folder on the main process; the others wait for it.

  Args:
    folder: Returns what to claim.
    peers: The `rendezvous.Peers` of a run on several hosts.
  """
  from scansnap_jax.experiment.processes import devices

  if folder is None:
    yield None
    return
  is_main = devices.is_main_process()
  with contextlib.ExitStack() as held:
    with devices.main_process_first():
      asked = folder()
      workdir = json_file.local_path(asked.path).absolute()
      if is_main:
        chosen = devices.number_settings()
        if chosen:  # Under others a resume would give other bits.
          settings = {**asked.settings, workdir_lib.ENVIRONMENT: chosen}
          asked = asked._replace(settings=settings)
        held.enter_context(workdir_lib.hold(*asked))
    if peers is not None:
      _check_shared(workdir, peers)
    yield workdir


def _check_shared(workdir: pathlib.Path, peers: Any) -> None:
  """Raises UserError, on all hosts, unless all see the folder of the first."""
  token = secrets.token_hex()
  path = workdir / ".token"
  token, *_ = peers.gather(token)
  if peers.index == 0:
    workdir_lib.write_atomic(path, token)
  peers.gather(None)  # It is written.
  sees = path.is_file() and path.read_text() == token
  for process, does in enumerate(peers.gather(sees)):
    if not does:
      peers.leave()  # All end by themselves, with one and the same line.
      raise errors.UserError(
          f"--workdir of process {process} is not the folder of process 0: all"
          " hosts must see one, on a disk that they share."
      )
