"""`holdfast sweep`: plan runs, train them, freeze a choice made on validation, read the test split, report."""
