"""The train room: optimizer steps, their guard and checkpoints, and the proof of what they did."""
