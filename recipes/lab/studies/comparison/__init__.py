"""Every protection on the lab: settings chosen on validation domains, frozen, then test domains (RESULTS.md)."""
