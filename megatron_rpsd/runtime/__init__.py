"""Where Megatron is adapted: the CPU runtime and small repairs of the released wheel, each with its upstream reason."""
