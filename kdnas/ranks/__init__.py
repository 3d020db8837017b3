"""Several processes that share one training; in one process nothing here does anything.

The first process, the leader, runs the command and writes all files. The others follow it: they wait for a function,
call it together with the leader, and wait again. Only inside of such a call is there more than one process.
"""
