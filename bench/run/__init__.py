"""A run from a plan to a result: subjects, workers, parity, rounds; scenarios, and suites of several runs."""
