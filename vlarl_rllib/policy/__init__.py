"""The policy as RLlib sees it."""
