"""Run the original network and the one it becomes on the same inputs."""
