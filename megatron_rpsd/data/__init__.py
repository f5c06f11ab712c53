"""Text to tokens: documents, Megatron's indexed datasets with a manifest, and the demonstration's model."""
