"""Many tasks from one backbone in memory."""
