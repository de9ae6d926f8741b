"""The lab: a tiny world in which alignment erosion is measured exactly."""
