"""Compilation for chips that are not there, and what it says of a kernel.

Public modules: chips, topology, compile, jobs, schedule, ptx, budgets. Of them
schedule and ptx compile in a process of their own, because the compilers read
the flags that make them report only when they are loaded.
"""
