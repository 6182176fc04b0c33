"""Engines sample action tokens: vLLM in Ray actors, or Hugging Face in the runner's own process."""
