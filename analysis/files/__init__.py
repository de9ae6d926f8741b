"""Files that are whole or absent: atomic writing, manifests, hashes, and the store of what references show."""
