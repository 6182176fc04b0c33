"""vLLM as an engine. Importing this loads no vLLM."""
