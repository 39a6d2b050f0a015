"""Mixers: what takes the place of attention, with a state of its own."""
