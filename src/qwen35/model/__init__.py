"""What is known of the Qwen3.5 family: geometry, names, roles."""
