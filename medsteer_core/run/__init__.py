"""Headless: a server, its client, and a workflow's run from the command line."""
