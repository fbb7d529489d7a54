"""One solution of each exercise: only the functions, and why they are written this way."""
