"""Choosing rows: what a rule is, the rules themselves, and the engine that applies them."""
