"""What several tests use: networks, loops, references."""
