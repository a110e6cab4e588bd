"""ComfyUI's folders: vectors, judges, kept samples and pairs by the names that users give them."""
