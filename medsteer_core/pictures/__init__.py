"""What people look at, as image tensors and text."""
