"""Convolutions in the place of attention: what is read lies near."""
