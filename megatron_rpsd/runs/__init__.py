"""What outlives a process of a run: its folder, its checkpoints, its attempts and its figures."""
