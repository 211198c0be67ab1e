"""Everything at once, and what to take of it."""
