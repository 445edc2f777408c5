"""Predicts what a training step costs on a TPU slice, by compiling it without a TPU."""
