"""MLX: weights as mlx-lm and mlx-vlm load them, on Macs and on Linux."""
