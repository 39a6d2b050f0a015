"""The flag --trackers of all scripts that write metrics.jsonl."""

from collections.abc import Callable, Mapping
import contextlib
import pathlib
from typing import Any

from absl import flags

flags.disclaim_key_flags()  # --help lists the flags under the script.


def define() -> flags.FlagHolder:
  """Defines --trackers, which `run.start` reads."""
  return flags.DEFINE_list(
      "trackers",
      [],
      "What shows metrics.jsonl while it is written, means over runs, and"
      " pictures: tensorboard (events in tensorboard/, extra [log]), wandb"
      " (Weights & Biases, extra [wandb]; WANDB_MODE=offline sends nothing), or"
      " both.",
  )


def names() -> list[str]:
  """Names that --trackers, and a script's --tensorboard, give."""
  given = flags.FLAGS.flag_values_dict()
  also = ["tensorboard"] if given.get("tensorboard") else []
  return list(dict.fromkeys([*given.get("trackers", ()), *also]))


def check() -> None:
  """Raises UserError if a name is unknown, given twice or not installed."""
  if names():
    # Imported here, so that --help and wrong flags answer at once.
    from scansnap_jax.experiment.trackers import tracker

    tracker.check(names())


def shown(
    workdir: pathlib.Path | None, settings: Callable[[], Mapping[str, Any]]
) -> contextlib.AbstractContextManager[None]:
  """Shows what is measured meanwhile, where --trackers asks for it.

  Args:
    workdir: The run's; None shows nothing.
    settings: Returns what is shown beside the numbers.
  """
  if workdir is None or not names():
    return contextlib.nullcontext()
  from scansnap_jax.experiment.trackers import tracker

  return tracker.shown(names(), workdir, settings())
