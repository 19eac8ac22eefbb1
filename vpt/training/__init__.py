"""Training: epochs of gradient steps, or a solution at once; whether it helps."""
