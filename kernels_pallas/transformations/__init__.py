"""What jax may do to an op: differentiate it, map it over devices, split it."""
