"""Can it be relied on: the same bytes, faults, hostile files, flat memory."""
