"""Attention systems: each is one file of the folder of its kind."""
