"""Carrying out a plan: the steps, and the processes and machines that share them."""
