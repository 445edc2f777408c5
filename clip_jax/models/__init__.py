"""The two towers of CLIP as pure Flax modules."""
