"""Commands that measure a training run or its starting model: analyze, watch and intervene."""
