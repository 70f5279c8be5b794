"""New weights of the layers behind swapped sites, by least squares."""
