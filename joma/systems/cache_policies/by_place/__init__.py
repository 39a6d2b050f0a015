"""Policies that go by the place of a token, or by chance."""
