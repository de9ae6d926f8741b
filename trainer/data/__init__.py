"""Training rows: where they come from, how they are rendered, and how they are found again in a batch."""
