"""
An inference server with SGLang's HTTP contract and SGLang's way of failing, small enough for a laptop.

Two processes, as there: the parent speaks HTTP (and imports neither torch nor numpy), the scheduler owns the
model. Promise: the endpoints, status codes, exit codes and log lines that a watchdog sees are those measured
on SGLang 0.5.23. Not promised: its speed, its memory behaviour, text, streaming, or anything that needs a
GPU.
"""
