"""Policies that go by attention weights."""
