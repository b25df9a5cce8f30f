"""What a run leaves behind: its folder, its metrics and its checkpoints."""
