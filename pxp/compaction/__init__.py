"""From a mask to a network that really is smaller and computes the same."""
