"""Fit the target of one site to what the original activation gives there, by least squares."""
