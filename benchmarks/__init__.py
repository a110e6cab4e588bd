"""Benchmarks: each a command (`python dev.py bench NAME`) that prints a table and writes output/bench/NAME.json."""
