"""Attention whose trained part has a closed form; no layers of a model."""
