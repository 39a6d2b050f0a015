"""Checkpoints on disk.

leaves          arrays of a step by their names
digest_handler  how the list of checksums lies in its file
noise           what orbax logs
"""
