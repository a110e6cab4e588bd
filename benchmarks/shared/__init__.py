"""What benchmarks share: their command lines, records, models, pictures, and ComfyUI's probe."""
