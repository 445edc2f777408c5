"""Measures what a trained model can do without more training, and writes reports."""
