"""What touches the inside of a Lightning Trainer, shared by callbacks; not public. May import export and below."""
