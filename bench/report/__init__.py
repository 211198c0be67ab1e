"""Results as people read them: what is shown, and a writer for each form."""
