"""Processes of one run meet before jax joins them, and stay in touch.

jax aborts with a dump, or waits for minutes, where a process is missing, comes
twice or was started otherwise than its peers; and unlike flags on two hosts
train a mixture without a word. Here each process first says to process 0, over
a plain socket at the coordinator's address, who it is and what it was started
with; all get the same answer. The sockets stay open: a process that dies closes
its own, and the others end with one line, at once. One that hangs (its machine
is stopped, swaps, or is cut off) sends no beat any more, and is lost after the
time that its peers wait for each other.

A message is one line of JSON. Process 0 relays: what each sends to `gather`
comes back to all as a list, in the order of processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import json
import queue
import select
import socket
import sys
import threading
import time
from typing import Any

from scansnap_jax.experiment import errors
from scansnap_jax.experiment.processes import interrupts

_PATIENCE = 10.0  # Seconds until a wait is said.
_RETRY = 0.2
_NEWS = 10.0  # Seconds in which a closed socket is seen, on a busy machine.
_BEATS = 8  # In the time after which one that sends none is lost.
_SLOWEST_BEAT = 10.0  # Seconds.
_BYE = "bye"
_BEAT = "beat"
_STOPPED = "stopped by "  # And the number of the signal.
_LOST = "lost "  # And what was lost, as all are to say it.
# A peer died, and not this process: temporary, so that a scheduler may retry.
LOST_STATUS = 75


class Peers:
  """The processes of a run, met."""

  def __init__(
      self,
      index: int,
      connections: Sequence[socket.socket],
      timeout: int | float,
  ):
    """Starts to listen to them.

    Args:
      index: Of this process.
      connections: To process 0; of process 0 one to each other, in order.
      timeout: Seconds without a sign of life after which one is lost.
    """
    self.index = index
    self._connections = list(connections)
    self._inboxes = [queue.Queue() for _ in connections]
    self._is_leaving = threading.Event()
    self._timeout = timeout
    self._period = min(_SLOWEST_BEAT, timeout / _BEATS)
    # Of each connection: a line that one thread writes is not cut by another's.
    self._locks = [threading.Lock() for _ in connections]
    self._silence = [0.0 for _ in connections]
    # A thread a peer: its end is seen while this process computes, or waits in
    # a collective that can never end. Daemons, for no thread holds up an exit.
    interrupts.before_leaving(self._tell_of_signal)
    for place in range(len(self._connections)):
      for work in (self._listen, self._beat):
        threading.Thread(target=work, args=(place,), daemon=True).start()

  @property
  def count(self) -> int:
    """How many there are; known to process 0 alone before `gather`."""
    return len(self._connections) + 1

  def gather(self, value: Any) -> list[Any]:
    """Returns what all processes gave to this call, on all of them."""
    # All go through process 0: each needs one address alone, and all get the
    # same list.
    if self.index == 0:
      values = [value, *(inbox.get() for inbox in self._inboxes)]
      for place in range(len(self._connections)):
        self._send(place, values)
      return values
    self._send(0, value)
    return self._inboxes[0].get()

  @property
  def is_one_silent(self) -> bool:
    """Whether a peer has missed several beats."""
    return max(self._silence, default=0) > self._timeout / 2

  def compare(self, facts: Mapping[str, Any]) -> None:
    """Holds what this process was started with against the others.

    Args:
      facts: Values by names that a user knows, such as `--lr_z`.

    Raises:
      UserError: They differ, on all processes.
    """
    first, *others = self.gather(dict(facts))
    for process, found in enumerate(others, start=1):
      for name in {**first, **found}:
        mine, its = first.get(name), found.get(name)
        if mine != its:
          self.leave()  # All end by themselves, with one and the same line.
          raise errors.UserError(
              f"{name} is {mine!r} on process 0 and {its!r} on process"
              f" {process}: start all processes of a run alike."
          )

  def leave(self) -> None:
    """Says that this process has done its work: it may end from now on."""
    # Before the word is sent: the peer may close before it is out.
    self._is_leaving.set()
    for place, connection in enumerate(self._connections):
      with contextlib.suppress(OSError):  # It has left, too.
        self._send(place, _BYE)
        connection.shutdown(socket.SHUT_WR)

  def _send(self, place: int, message: Any) -> None:
    with self._locks[place]:
      _send(self._connections[place], message)

  def _beat(self, place: int) -> None:
    """Gives a sign of life, again and again."""
    with contextlib.suppress(OSError):  # Who listens sees that it is gone.
      while not self._is_leaving.wait(self._period):
        self._send(place, _BEAT)

  def _tell_of_signal(self, number: int) -> None:
    """Lets the others end by the same signal: they cannot go on alone."""
    self._tell_all(f"{_STOPPED}{number}")

  def _tell_all(self, message: str) -> None:
    """A last word, which does not wait for one that takes nothing any more."""
    for connection, lock in zip(self._connections, self._locks, strict=True):
      with contextlib.suppress(OSError):
        has_lock = lock.acquire(timeout=1)
        connection.setblocking(False)
        _send(connection, message)
        if has_lock:
          lock.release()

  def _listen(self, place: int) -> None:
    """Puts messages into an inbox; ends the process if the peer is lost."""
    has_left = False
    process = place + 1 if self.index == 0 else 0
    with self._connections[place] as connection:
      for line in self._lines(place, connection):
        if line is None and not has_left:
          self._end_as_lost(
              f"process {process} gave no sign of life for"
              f" {self._timeout:g} s (--multihost_timeout): it hangs, or its"
              " host cannot be reached."
          )
        message = _BEAT if line is None else _parse(line)
        if message == _BEAT:
          continue
        has_left = has_left or message == _BYE
        if isinstance(message, str) and message.startswith(_STOPPED):
          self._end_by_signal(process, int(message.removeprefix(_STOPPED)))
        if isinstance(message, str) and message.startswith(_LOST):
          self._end_as_lost(message.removeprefix(_LOST))
        self._inboxes[place].put(message)
    # A socket that closes without a word is a process that died.
    if not has_left:
      self._end_as_lost(
          f"process {process} ended before the run was done; its own output"
          " says why."
      )

  def _lines(
      self, place: int, connection: socket.socket
  ) -> Iterator[bytes | None]:
    """Lines until the peer is gone, however it goes; None if it is silent."""
    ready, buffer = select.poll(), b""
    ready.register(connection, select.POLLIN)
    # Silence is counted in waits, so that to have been stopped oneself (a job
    # that its cluster suspends) is one of them.
    while True:
      if not ready.poll(1000 * self._period):
        self._silence[place] += self._period
        if self._silence[place] >= self._timeout:
          yield None
        continue
      self._silence[place] = 0.0
      try:
        chunk = connection.recv(2**16)
      except OSError:
        return
      if not chunk:
        return
      *whole, buffer = (buffer + chunk).split(b"\n")
      yield from whole

  def _end_as_lost(self, what: str) -> None:
    """Ends this process as another is lost, and lets the others say the same.

    Process 0 alone is connected to all: what the others see of a third is that
    process 0 ends.
    """
    if self._is_leaving.is_set():
      return
    if self.index == 0:
      self._tell_all(f"{_LOST}{what}")
    interrupts.end(
        f"error: {what} The same command continues from the last checkpoint.",
        LOST_STATUS,
    )

  def _end_by_signal(self, process: int, number: int) -> None:
    """Ends this process as a signal ended another, and passes it on."""
    if self._is_leaving.is_set():
      return
    self._tell_of_signal(number)
    name = interrupts.name_of(number)
    interrupts.end(f"process {process} was stopped by {name}.", 128 + number)


@contextlib.contextmanager
def heard_out(peers: Peers | None) -> Iterator[None]:
  """Lets the word of a lost peer come before the error of what it broke.

  A collective fails in this thread while another learns from the socket who is
  gone, and ends the process in one line.

  Args:
    peers: The processes of a run on several hosts, otherwise None.
  """
  try:
    yield
  except errors.UserError:
    raise
  except Exception as error:
    is_of_a_file = getattr(error, "filename", None) is not None
    if peers is not None and not is_of_a_file:
      time.sleep(_NEWS)  # Nobody was lost if this ends.
      while peers.is_one_silent:  # It is heard of again, or the process ends.
        time.sleep(_RETRY)
    raise


def meet(address: str, count: int, index: int, *, timeout: int) -> Peers:
  """Waits until all processes of a run are there.

  Args:
    address: HOST:PORT of process 0, the coordinator's. The port is free again
      afterwards.
    count: How many processes there are.
    index: Which this is, from 0.
    timeout: Seconds to wait at most; afterwards, those without a sign of life
      after which a process is lost.

  Returns:
    The processes.

  Raises:
    UserError: The address is none or is taken, the index is out of range or was
      given twice, counts differ, or somebody does not come.
  """
  host, _, port = address.rpartition(":")
  if not (host and port.isdecimal() and 0 < int(port) < 2**16):
    raise errors.UserError(
        f"the coordinator's address must be HOST:PORT, got {address!r}."
    )
  if not 0 <= index < count:
    raise errors.UserError(
        f"process id {index} is out of range: {count} processes have ids 0 to"
        f" {count - 1}."
    )
  wait = _Wait(address, count, timeout)
  if index == 0:
    return Peers(0, _receive_all(int(port), count, wait), timeout)
  call = _call(host, int(port), count, index, wait)
  return Peers(index, [call], timeout)


class _Wait:
  """A wait that ends, and is said when it becomes long."""

  def __init__(self, address: str, count: int, timeout: int):
    self._started = time.monotonic()
    self._address, self._count, self._timeout = address, count, timeout
    self._is_said = False

  def check(self, num_missing: int) -> None:
    """Raises UserError when the time is over."""
    waited = time.monotonic() - self._started
    who = f"{num_missing} of {self._count} processes at {self._address}"
    if waited > self._timeout:
      raise errors.UserError(
          f"{who} did not come within {self._timeout} s. Start the same"
          " command on every host, or give more time (--multihost_timeout)."
      )
    if waited > _PATIENCE and not self._is_said:
      self._is_said = True
      print(f"waiting for {who}, up to {self._timeout} s", file=sys.stderr)


def _receive_all(port: int, count: int, wait: _Wait) -> list[socket.socket]:
  """Process 0: takes a call of every other process, and answers all alike."""
  found: dict[int, socket.socket] = {}
  try:
    server = socket.create_server(("", port), backlog=count)
  except OSError as error:
    raise errors.UserError(
        f"port {port} of the coordinator cannot be opened: {error.strerror}."
        " Give JAX_COORDINATOR_ADDRESS a free one on all hosts, and one process"
        " alone the id 0."
    ) from error
  with server, contextlib.ExitStack() as on_failure:
    # Short waits, so that a missing process is told and the time kept.
    server.settimeout(_RETRY)
    while len(found) < count - 1:
      wait.check(count - 1 - len(found))
      try:
        connection, _ = server.accept()
      except TimeoutError:
        continue
      on_failure.enter_context(connection)
      problem = _admit(connection, count, found)
      if problem is not None:
        for peer in {*found.values(), connection}:
          with contextlib.suppress(OSError):
            _send(peer, {"error": problem})
        raise errors.UserError(problem)
    on_failure.pop_all()
  # Only now: a process that is let in must not start while one may be refused.
  in_order = [found[process] for process in range(1, count)]
  for connection in in_order:
    _send(connection, {"error": None})
  return in_order


def _admit(
    connection: socket.socket, count: int, found: dict[int, socket.socket]
) -> str | None:
  """Adds a caller to those found, or says what is wrong with it."""
  connection.settimeout(_PATIENCE)
  try:
    hello = json.loads(_read_line_of(connection))
    its_index, its_count = int(hello["index"]), int(hello["count"])
  except (OSError, ValueError, KeyError, TypeError):
    connection.close()  # A port scanner, or a peer that died: nobody of ours.
    return None
  connection.settimeout(None)
  if its_count != count:
    return (
        f"process {its_index} was started as one of {its_count} processes, and"
        f" process 0 as one of {count}."
    )
  if its_index in found or its_index == 0:
    return f"two processes have the id {its_index}: give each its own."
  found[its_index] = connection
  return None


def _call(
    host: str, port: int, count: int, index: int, wait: _Wait
) -> socket.socket:
  """Any other process: calls process 0 until it answers."""
  while True:
    wait.check(1)
    try:
      connection = socket.create_connection((host, port), timeout=_PATIENCE)
      break
    except socket.gaierror as error:
      raise errors.UserError(
          f"the coordinator's host {host} is not known: {error.strerror}."
      ) from error
    except OSError:
      time.sleep(_RETRY)
  try:
    _introduce(connection, count, index, wait)
  except BaseException:
    connection.close()
    raise
  return connection


def _introduce(
    connection: socket.socket, count: int, index: int, wait: _Wait
) -> None:
  """Says who this process is; raises UserError if process 0 refuses it."""
  _send(connection, {"index": index, "count": count})
  connection.settimeout(_RETRY)
  answer = _read_line_of(connection, lambda: wait.check(1))
  connection.settimeout(None)
  if not answer:
    raise errors.UserError("process 0 ended before all processes were there.")
  problem = json.loads(answer)["error"]
  if problem is not None:
    raise errors.UserError(problem)


def _send(connection: socket.socket, message: Any) -> None:
  connection.sendall(json.dumps(message).encode() + b"\n")


def _read_line_of(
    connection: socket.socket, on_silence: Callable[[], None] | None = None
) -> bytes:
  """A line, byte by byte, so that nothing of the next is taken."""
  line = b""
  while not line.endswith(b"\n"):
    try:
      byte = connection.recv(1)
    except TimeoutError:
      if on_silence is None:
        raise
      on_silence()
      continue
    if not byte:
      return b""
    line += byte
  return line


def _parse(line: bytes) -> Any:
  """A message, or nothing where a signal broke into one."""
  try:
    return json.loads(line)
  except ValueError:
    return None
