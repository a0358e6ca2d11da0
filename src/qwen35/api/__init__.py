"""The public API: one function per verb, called by the command line too.

Each function checks its arguments, opens inputs and runs a job. It must not print, parse arguments
or exit.
"""
