"""Protections keep a fine-tune aligned. Each one is a class with the interface of `base.Protection`."""
