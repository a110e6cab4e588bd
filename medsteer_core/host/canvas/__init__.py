"""What ComfyUI's canvas and its users see of a run: notes, progress, what a shared file may tell."""
