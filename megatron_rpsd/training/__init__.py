"""The objective on Megatron's training loop: arguments, view batches, forward step, entry point.

Import submodules directly: the entry point must choose the device before Megatron is imported.
"""
