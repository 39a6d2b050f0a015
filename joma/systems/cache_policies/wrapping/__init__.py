"""Policies that change what another one makes of a token."""
