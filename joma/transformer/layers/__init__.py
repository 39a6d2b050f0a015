"""The layers of a model as one, or one by one; public module: scanning."""
