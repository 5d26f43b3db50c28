"""The audit: what is wrong with the data, found before anything is trained.

Each check is a module of two halves. What can be said of one record alone is found while it is prepared, in parallel, and kept
with its shard; what takes the whole (duplicates, labels, shares) is concluded from those facts in bounded memory.
"""
