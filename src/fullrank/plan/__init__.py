"""The plan room: how a recipe is carried out on this machine, in bytes and seconds, before anything is spent."""
