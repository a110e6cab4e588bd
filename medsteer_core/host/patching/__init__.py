"""ComfyUI's models: where steering reaches into them, and the hooks of one model call."""
