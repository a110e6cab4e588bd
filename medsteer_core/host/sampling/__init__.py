"""ComfyUI's samplers: schedules, the runs of an extraction, factual and counterfactual runs."""
