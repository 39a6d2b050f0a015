"""Policies of KV caches: which token leaves when there is no slot left."""
