"""Continuous batching: sequences join and leave a batch between its steps.

rows       the programs of a batch, compiled once for all that join it
batch      a batch of rows, of which each is one sequence's or free
queue      requests that wait for a row
streaming  prompts to tokens, so many prompts at a time
"""
