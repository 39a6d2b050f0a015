"""Checkpoints on disk: `leaves` by their names, `noise` of orbax."""
