"""Devices and engines: who computes a step, and where."""
