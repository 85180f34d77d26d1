"""Layer-wise relevance propagation: rules, what passes relevance on, and composites that place them."""
