"""Code that uses the internals of a Lightning Trainer, shared by the callbacks; not part of the public API."""
