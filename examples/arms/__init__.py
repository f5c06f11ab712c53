"""One folder per arm of the paper's comparison: the flags that make it, all through the same training entry."""
