"""MedSteer: counterfactual image pairs for medical imaging, as a ComfyUI node pack."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
