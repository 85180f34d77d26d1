"""What a model is: its layers, its structure as one pass shows it, the replica that is worked on, its components."""
