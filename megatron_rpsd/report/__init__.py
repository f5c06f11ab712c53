"""What a run leaves for its reader: scalars read back, figures, and one self-contained HTML page."""
