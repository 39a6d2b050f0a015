"""Processes of a run: what they run on, how they meet, how they are stopped.

`devices` chooses the platform and joins hosts, over `rendezvous`, where hosts
meet first. `preemption` holds signals back while a loop trains; `interrupts`
ends a process by them everywhere else. `variables` and `xla_flags` look at what
libraries read of the environment. `digest` says what a tree of arrays is, and
whether all processes hold the same.
"""
