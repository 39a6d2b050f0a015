"""Policies that go by keys and values."""
