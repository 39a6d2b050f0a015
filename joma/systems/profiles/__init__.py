"""Profiles: what is measured of a model for the systems that ask for it."""
