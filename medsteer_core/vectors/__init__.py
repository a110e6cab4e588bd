"""The pathology vector as a value: its file, lookup by noise level, algebra, and the published formats."""
