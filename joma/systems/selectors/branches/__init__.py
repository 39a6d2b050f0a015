"""Attention by several branches of keys at once."""
