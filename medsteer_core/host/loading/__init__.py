"""ComfyUI's loaders: a checkpoint, the embedded model or a LoRA as a model that ComfyUI samples."""
