"""A plan of many pairs as tasks for many GPUs. Ray is imported only in `driver`, when a plan is run."""
