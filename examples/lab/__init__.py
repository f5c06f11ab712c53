"""The position lab: what RPSD does to a two-layer model on a synthetic retrieval language, on two CPU cores."""
