"""Statistics of activations: a forward pass over a text, one decoder layer in memory at a time."""
