"""First and second start of every script.

commands  what each script is started with
watched   a process whose lines are timed
"""
