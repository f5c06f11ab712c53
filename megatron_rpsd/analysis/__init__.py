"""What a model does inside, measured: where its attention goes."""
