"""What answers a prompt: a model here, a server elsewhere, answers from a file, or three rulers to check with."""
