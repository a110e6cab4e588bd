"""Socket types and categories that several nodes share."""

from comfy_api.latest import io

CATEGORY = "MedSteer"
Vector = io.Custom("MEDSTEER_VECTOR")
Record = io.Custom("MEDSTEER_RECORD")
