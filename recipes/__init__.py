"""What to run: YAML recipes, one folder for each experiment, and the lab (README.md says which for which machine)."""
