"""Attention by XLA: entry (forward, backward), and the loops over its tiles."""
