"""What a model can do without further training, and the report of it."""
