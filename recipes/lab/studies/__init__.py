"""Studies on the lab over many seeds: evidence, findings, causes, and the comparison of all protections."""
