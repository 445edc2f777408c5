"""The names of the activation functions of a transformer's MLP; importing them does not import JAX."""

# OpenAI's, and PyTorch's default, which most of open_clip's own models have.
ACTIVATIONS = ("quick_gelu", "gelu")
