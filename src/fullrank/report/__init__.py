"""The report room: what a run's records say, as one HTML page, figures and a model card.

It reads the run folder and nothing else, computes no score, and prints no claim without a record.
"""
