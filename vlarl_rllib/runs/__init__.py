"""A run's directory, checkpoints and export, the Ray that it runs in, and what is checked before it starts."""
