"""From activations to a pathology vector: capture, kept samples, estimators, the report on their quality."""
