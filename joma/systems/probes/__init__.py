"""Probes of attention maps, residual streams and updates, by name.

names          the list, which imports no jax
maps           of one layer's attention weights
stream         of the residual stream: secondary sinks
update_rank    of what training has changed
recall         what heads and MLPs add to the logits
drift          heads that look elsewhere once instructions conflict
patching       heads of one run that say what they said in another
read           several of them, over all layers of a model
"""
