"""All that touches the inside of a Lightning Trainer: what callbacks share, and what users do not import."""
