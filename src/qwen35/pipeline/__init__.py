"""The paths with their gates: a graph of steps, planned whole, run as far as the gates allow."""
