"""Files that are whole or absent: atomic writing, manifests, hashes, and the store of tensors that analyses share."""
