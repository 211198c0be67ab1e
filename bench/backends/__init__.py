"""One file for each runtime; every one adapts it, on each device it has, to `bench.backend.Backend`.

The table of all of them is `bench.backend.BACKENDS`. The files import their runtime where they use it, never at the
top: listing the backends must cost nothing.
"""
