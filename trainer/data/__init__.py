"""Training rows: where they come from, how they are rendered, and how a batch finds them again."""
