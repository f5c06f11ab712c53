"""Adapt a real 135M model with RPSD on two CPU cores, beside plain training, and report what changed."""
