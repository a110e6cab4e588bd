"""A vector acting on activations: operators, plans, rows, selection of blocks and heads, the token map."""
