"""The one exception that is the user's to fix."""


class UserError(ValueError):
  """A setting, path or file that the person at the shell can put right.

  `launch.command.app.run` prints its message as one line without a traceback;
  every other exception is a bug and keeps its traceback. The message says what
  was found, where, and what to do.
  """
