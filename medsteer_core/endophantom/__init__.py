"""EndoPhantom: procedural endoscopy phantoms with ground truth, and the small model trained on them."""
