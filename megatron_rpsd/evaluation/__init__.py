"""What a model does: its losses under both views, and how sensitive it is to a perturbation."""
