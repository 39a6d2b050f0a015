"""Systems of layers that take from other layers, and of texts from texts."""
