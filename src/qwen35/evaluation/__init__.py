"""How far quantized models are from the unquantized one, token by token."""
