"""`distill`: the original network teaches the converted one, without labels."""
