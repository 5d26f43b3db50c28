"""Evaluation: what the base and the tuned model score on the same items, with intervals."""
