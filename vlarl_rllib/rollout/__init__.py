"""Acting: slots, the event loop that keeps them busy, and RLlib's EnvRunner around them."""
