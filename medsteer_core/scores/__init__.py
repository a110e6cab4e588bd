"""The one scorer of pairs, and what it measures."""
