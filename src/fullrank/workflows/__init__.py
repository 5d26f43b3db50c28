"""Workflows: what needs several rooms."""
