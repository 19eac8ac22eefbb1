"""Training, evaluation, and runs that leave a folder of results."""
