"""Protections: what keeps a fine-tune aligned. Each protection is one class with the interface of `base.Protection`."""
