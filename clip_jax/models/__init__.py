"""The CLIP model as Flax modules: an image tower and a text tower (its two encoders), and their settings."""
