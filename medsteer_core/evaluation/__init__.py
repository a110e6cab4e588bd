"""The report over many pairs, and its command."""
