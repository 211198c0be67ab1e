"""What was found: values, from raw samples to what is derived of them, and the files that they stand in."""
