"""The criterion is a hyperparameter: what may vary, the search, and finished studies."""
