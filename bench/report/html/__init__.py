"""Results as one HTML page that opens without a network.

Owns the page: its markup, its charts, its style and its script. Computes nothing that is measured: every figure is
already in the results.
"""
