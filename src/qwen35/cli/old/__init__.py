"""The commands of the earlier toolkit, under their own names and with their own flags.

Thin wrappers around the same functions as the verbs; nothing else imports them.
"""
