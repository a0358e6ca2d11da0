"""Where outputs go: a staging folder that becomes the output in one rename, and the files in it."""
