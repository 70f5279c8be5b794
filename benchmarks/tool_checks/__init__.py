"""Other people's tools on networks in four states: `python -m tool_checks`."""
