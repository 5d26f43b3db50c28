"""Worked cases: small, honest tasks whose data the package can make anywhere, offline, from a seed.

A case module offers `generate`, `write_case`, `INSTRUCTIONS` (how to ask an untuned model fairly) and `TASKS` (what is
scored). Cases belong to the hallway: no torch, no network, no files but those asked for.
"""
