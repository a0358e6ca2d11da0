"""The verbs as functions: what `import qwen35` offers, and what the command line calls."""
