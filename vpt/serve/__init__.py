"""Many tasks on one backbone in memory: the bank, and the HTTP server on it."""
