"""A process that has imported everything, and forks itself for each attack.

  python -m tests.faults.zygote

A script takes ten seconds to import what it needs and a tenth to do what an
attack asks of it. This process imports jax and the product once, starts no
backend (whose threads would not survive a fork), and makes a child for each
line of JSON that it reads. The child then is what `python -m MODULE` would be:
it runs the module as __main__ and leaves as the interpreter leaves.
"""

import atexit
import base64
import errno
import gc
import importlib
import json
import logging
import math
import os
import pkgutil
import pty
import resource
import runpy
import select
import shutil
import signal
import sys
import threading
import time
import warnings

# A script defines flags when it is imported, so that it is run and no more.
_IMPORTED = (
    *("launch.command.app", "launch.command.run", "launch.command.flag_config"),
    *("launch.bench.harness", "matplotlib.pyplot", "rich.progress"),
    *("matplotlib.backends.backend_pdf", "matplotlib.backends.backend_agg"),
    *("safetensors.numpy", "tokenizers", "jax.experimental.pallas"),
)
_PACKAGES = ("scansnap_jax", "joma")
_SOON = 0.002
# One pixel.
_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9"
    "awAAAABJRU5ErkJggg=="
)


def _import_everything() -> None:
  """Imports what scripts import; what is not installed they do without."""
  import joma
  import scansnap_jax

  names = list(_IMPORTED)
  for package in (scansnap_jax, joma):
    prefix = f"{package.__name__}."
    names += [m.name for m in pkgutil.walk_packages(package.__path__, prefix)]
  for name in names:
    try:
      importlib.import_module(name)
    except ImportError:
      pass


def _serve() -> dict:
  """Answers orders; returns, in the child that one of them makes, its order."""
  orders = os.fdopen(os.dup(0), "r")
  answers = os.fdopen(os.dup(1), "w")
  # Whatever an import or a child writes is not an answer.
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  os.dup2(2, 1)
  if "--cold" not in sys.argv:
    _import_everything()
  gc.collect()
  gc.freeze()
  for line in _greeted(orders, answers):
    order = json.loads(line)
    if "module" in order:
      child = os.fork()
      if not child:
        os.close(orders.fileno())
        os.close(answers.fileno())
        # Folders that imports made, as matplotlib's where it may write nowhere,
        # are for all children: their parent removes them.
        atexit.unregister(shutil.rmtree)
        return order
      answer = {"pid": child}
    else:
      answer = _wait(order["wait"], order["wall_s"])
    _write(answers, answer)
  sys.exit()


def _greeted(orders, answers):
  threads = len(os.listdir("/proc/self/task"))
  _write(answers, {"threads": threads})
  yield from iter(orders.readline, "")


def _write(answers, answer: dict) -> None:
  answers.write(json.dumps(answer) + "\n")
  answers.flush()


def _wait(child: int, wall_s: float) -> dict:
  """Waits for a child, and ends it with its children where it takes longer."""
  until, is_late = time.monotonic() + wall_s, False
  while True:
    pid, status, usage = os.wait4(child, os.WNOHANG)
    if pid:
      break
    if time.monotonic() > until:
      is_late = True
      os.killpg(child, signal.SIGKILL)
    time.sleep(_SOON)
  try:
    os.killpg(child, signal.SIGKILL)  # What it started and left.
  except ProcessLookupError:
    pass
  return {
      "status": os.waitstatus_to_exitcode(status),
      "is_late": is_late,
      "memory": usage.ru_maxrss * 1024,
      "cpu_s": usage.ru_utime + usage.ru_stime,
  }


def _become(order: dict) -> None:
  """Makes this child what a shell would have started."""
  os.setpgid(0, 0)
  os.chdir(order["cwd"])
  for name, value in order["env"].items():
    if value is None:
      os.environ.pop(name, None)
    else:
      os.environ[name] = value
  for kind, most in order["limits"].items():
    number = getattr(resource, f"RLIMIT_{kind}")
    resource.setrlimit(number, (most, resource.getrlimit(number)[1]))
  for number, (name, place) in enumerate(order["streams"].items()):
    _set_stream(number, name, place)
  sys.argv[1:] = order["argv"]
  for hook in order["hooks"]:
    _HOOKS[hook]()


def _set_stream(number: int, name: str, place: str) -> None:
  """Gives a stream another end: a file by its path, or one of these kinds."""
  flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
  if place == "closed":
    os.close(number)
    setattr(sys, name, None)  # As the interpreter finds it.
    _forget_stream(name)
    return
  kind, _, argument = place.partition(":")
  if kind == "terminal":  # What it shows is kept in a file.
    ours, end = pty.openpty()
    _read_on(ours, argument)
  elif kind == "head":  # A reader that wants so many bytes.
    ours, end = os.pipe()
    _read_on(ours, os.devnull, int(argument))
  elif kind == "unwritable":
    end = os.open(argument, os.O_RDONLY | os.O_CREAT, 0o600)
  else:
    end = os.open(place, flags, 0o600)
  os.dup2(end, number)
  if end > 2:
    os.close(end)
  if number == 1:
    sys.stdout.reconfigure(line_buffering=os.isatty(1))


def _read_on(ours: int, path: str, most: float = math.inf) -> None:
  """Reads the other end of a stream in the background, then closes it."""
  if not most:
    os.close(ours)
    return

  def read() -> None:
    left = most
    with open(path, "ab", buffering=0) as file:
      while left and (data := os.read(ours, int(min(left, 4096)))):
        file.write(data)
        left -= len(data)
    os.close(ours)

  threading.Thread(target=read, daemon=True).start()
  if most == math.inf:  # What was written is read before the process ends.
    atexit.register(_wait_for_reader, ours)


def _wait_for_reader(ours: int) -> None:
  while select.select([ours], [], [], 0)[0]:
    time.sleep(_SOON)
  time.sleep(0.05)


def _forget_stream(name: str) -> None:
  """What logs to a stream from its import on would have found none."""
  if name == "stderr":
    for logger in (logging.getLogger("absl"), logging.getLogger()):
      for handler in logger.handlers:
        if hasattr(handler, "python_handler"):
          handler.python_handler.stream = open(os.devnull, "w")


def _stop_at_every_evaluation() -> None:
  """Every loop is told, at its first look, that a stop was asked for."""
  from scansnap_jax.experiment.processes import preemption

  preemption.on_any_process = lambda requested: True


def _describe_flags() -> None:
  """A script prints the flags that it has, as JSON, in place of its work."""
  from absl import flags

  from launch.command import app

  def describe(_, **options) -> None:
    keys = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    found = [
        {
            "name": flag.name,
            "expects": flag.parser.syntactic_help or flag.flag_type(),
            "choices": list(getattr(flag.parser, "enum_values", [])),
            "is_bool": bool(flag.boolean),
        }
        for flag in keys
    ]
    print(json.dumps(found))

  app.run = describe


def _draw_nothing() -> None:
  """Figures are empty: drawing them is most of what a small run costs."""
  from matplotlib import figure

  figure.Figure.savefig = lambda self, file, **options: file.write(_PNG)


def _time_nothing() -> None:
  """Benchmarks call what they measure of the machine once, not many times."""
  import numpy as np

  from launch.bench import harness

  def once(call, num_calls):
    call()
    return np.full(num_calls, 1e-3)

  harness.seconds_of = once


_HOOKS = {
    "stops": _stop_at_every_evaluation,
    "flags": _describe_flags,
    "undrawn": _draw_nothing,
    "untimed": _time_nothing,
}


def main() -> None:
  """Serves; in a child, runs what was ordered."""
  # Nothing of this process's own warnings belongs to an attack.
  warnings.filterwarnings("ignore", message=r"os\.fork\(\)")
  order = _serve()
  try:
    _become(order)
  except OSError as error:
    print(f"the attack itself fails: {error}", file=sys.stderr)
    os._exit(errno.EPROTO)
  runpy.run_module(order["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
