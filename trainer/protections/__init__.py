"""One file per protection, all with the same small interface."""
