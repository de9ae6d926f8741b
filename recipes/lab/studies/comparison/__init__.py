"""All protections compared on the lab: settings are chosen on validation domains, frozen, then read on test domains."""
