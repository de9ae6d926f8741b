"""What to run: YAML recipes, one folder per experiment, and the lab world."""
