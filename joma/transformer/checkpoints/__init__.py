"""What is measured of checkpoints on disk: parts of `launch.inspect_lm`."""
