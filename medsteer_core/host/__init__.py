"""The host adapter: the only part of MedSteer that imports ComfyUI."""
