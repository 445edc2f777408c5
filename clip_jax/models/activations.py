"""Names of the activation functions of a transformer's MLP. This module does not import JAX."""

# The first is OpenAI's. The second is PyTorch's default, in most of open_clip's own models.
ACTIVATIONS = ("quick_gelu", "gelu")
