"""Sequences: chat -> tokens and mask, the token store, the order of examples, their layout, the loss law."""
