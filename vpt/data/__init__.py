"""Cards → sources → few-shot splits → transforms → loaders."""
