"""Reading checkpoints: headers first, bytes by range, nothing trusted before it is checked."""
