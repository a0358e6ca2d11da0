"""Plans: complete descriptions of outputs, made from headers alone."""
