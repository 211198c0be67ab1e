"""One file for each runtime; every one adapts it, on each device it has, to `bench.backends.contract.Backend`.

The table of all of them is `bench.backends.registry.BACKENDS`. The files import their runtime where they use it, never
at the top: listing the backends must cost nothing.
"""
