"""The coverage run over the model zoos: which models, how each is checked, what is reported."""
