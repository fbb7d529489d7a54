"""The tutorial's exercises. Each file holds a question, functions to write, and their check."""
