"""What a training step costs on a TPU slice that isn't here, by the compiler for it."""
