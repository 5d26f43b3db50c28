"""Data: records in, token ids and a supervised mask out."""
