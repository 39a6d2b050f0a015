"""Policies whose cache is not one of slots that all heads have alike."""
