"""Files and names, nothing of the method: paths that stay inside, whole files, same bytes, the restricted pickle."""
