"""Other formats: Hugging Face folders, GGUF, others' weights."""
