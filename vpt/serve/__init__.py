"""Many prompts on one backbone: the bank, and the HTTP server on it."""
