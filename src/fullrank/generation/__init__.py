"""Decoding and likelihood, for evaluation, chat and samples."""
