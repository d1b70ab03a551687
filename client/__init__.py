"""Asks: the Python client, the remote handle and the command line."""
