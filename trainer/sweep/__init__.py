"""`holdfast sweep`: plan the runs, do them, freeze a choice made on validation, test it, report."""
