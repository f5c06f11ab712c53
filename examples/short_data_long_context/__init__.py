"""Short data, long context: distillation of long retrieval from packed short samples, on two CPU cores."""
