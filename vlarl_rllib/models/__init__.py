"""Models: OpenVLA in plain torch, its small presets, and the critic. Importing this package loads no torch."""
