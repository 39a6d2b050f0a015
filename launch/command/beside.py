"""A thread for what a script can make while it trains."""

from collections.abc import Iterator
from concurrent import futures
import contextlib


@contextlib.contextmanager
def one_thread() -> Iterator[futures.Executor]:
  """A pool of one thread, for figures and tables beside training.

  Of one thread, for matplotlib's settings are the process's. What it has not
  begun when an error or a signal ends the run is dropped.
  """
  pool = futures.ThreadPoolExecutor(1)
  try:
    yield pool
  finally:
    pool.shutdown(cancel_futures=True)
