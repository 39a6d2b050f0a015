"""Studies of probes: what they find of small models that are known."""
