"""The network: its shape, its initial weights and its loss."""
