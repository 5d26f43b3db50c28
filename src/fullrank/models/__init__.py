"""Models: found, loaded, checked and exported."""
