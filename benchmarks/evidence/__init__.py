"""Does it work: what is flipped and kept, by which method, judged by whom."""
